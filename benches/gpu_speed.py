"""Time and memory of the op on a GPU, by each backend, in turn with its peers.

One part of ``make gpu-check``.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton.testing
from torch import Tensor

from benches import peers
from benches.cases import Case, Mode
from benches.gpu_model import MAPS
from benches.timing import QUICK, interleave
from metapool_kernels import fused_meta_pool
from metapool_kernels.dispatch import BACKENDS
from tests import cuda_host

GPU_BACKENDS = ("triton", "cuda")
ROUNDS = 3
PEERS = (
    "eager",
    "eager channels_last",
    "torch.compile",
    "nested max",
    "nested max channels_last",
    "merged convolution",
    "merged convolution channels_last",
    "copy",
)


def cases(tiny: bool) -> list[Case]:
    """Maps of MobileNetV2, all of them in both dtypes; or two tiny ones for a rehearsal."""
    if tiny:
        return [Case((2, 5, 6), mode, "default", batch=1) for mode in (Mode.FORWARD, Mode.BOTH)]
    return [
        Case((channels, side, side), mode, candidates, batch=128, dtype=dtype, slow_peers=True)
        for channels, side in MAPS
        for dtype in (torch.float32, torch.bfloat16)
        for candidates in ("default", "avg")
        for mode in (Mode.FORWARD, Mode.BOTH, Mode.DOUBLE)
        if candidates == "default" or mode is Mode.FORWARD
    ]


def _step(run: peers.Run, case: Case, x: Tensor, weights: Tensor) -> Callable[[], object]:
    """One call of what a case asks for."""
    if case.mode is Mode.FORWARD:
        return lambda: run(x.detach(), weights.detach())
    grad_out = torch.ones_like(x)
    if case.mode is Mode.BOTH:
        return lambda: torch.autograd.grad(run(x, weights), (x, weights), grad_out)
    return lambda: _double(run, x, weights, grad_out)


def _double(run: peers.Run, x: Tensor, weights: Tensor, grad_out: Tensor) -> object:
    grad_out = grad_out.detach().requires_grad_()
    grads = torch.autograd.grad(run(x, weights), (x, weights), grad_out, create_graph=True)
    return torch.autograd.grad([(grad.float() ** 2).sum() for grad in grads], (x, weights))


def _available(x: Tensor) -> list[str]:
    return [backend for backend in GPU_BACKENDS if BACKENDS[backend](x) is None]


def _ours(case: Case, backend: str) -> peers.Run:
    return partial(fused_meta_pool, candidates=case.names, normalize=None, backend=backend)


def _steps(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """Ours by each backend in both layouts, and every peer that can do the case."""
    generator = torch.Generator(device).manual_seed(0)
    size = (case.batch, *case.size)
    x = (torch.randn(size, device=device, generator=generator) * 4).clamp(0, 6).to(case.dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    weights = torch.rand(len(case.names), device=device, generator=generator)
    for leaf in (x, last, weights):
        leaf.requires_grad_()
    steps: dict[str, Callable[[], object]] = {}
    for backend in _available(x):
        steps[backend] = _step(_ours(case, backend), case, x, weights)
        steps[f"{backend} channels_last"] = _step(_ours(case, backend), case, last, weights)
    suited = peers.peers_for(case)
    with torch.device(device):
        for name in PEERS:
            if name in suited and (name != peers.COPY or case.mode is Mode.FORWARD):
                peer = suited[name]
                is_last = peer.layout is torch.channels_last
                steps[name] = _step(peer.make(case.names), case, last if is_last else x, weights)
    return steps


def _seconds(steps: dict[str, Callable[[], object]], on_gpu: bool) -> dict[str, float]:
    """The median time of each step, taken in turn; on a GPU the second-level cache is cold."""
    if not on_gpu:
        return {name: times.median for name, times in interleave(steps, QUICK).items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            bench = triton.testing.do_bench(step, warmup=5, rep=30, return_mode="median")
            taken[name].append(bench / 1e3)
    return {name: median(values) for name, values in taken.items()}


def _peak(step: Callable[[], object]) -> int:
    """Bytes that a step takes beyond what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, device: str) -> dict[str, Any]:
    """One row: what was measured, and the case in words."""
    on_gpu = device == "cuda"
    steps = _steps(case, device)
    row: dict[str, Any] = {"case": str(case), "elements": case.elements}
    row["seconds"] = _seconds(steps, on_gpu)
    if on_gpu:
        ours = [name for name in GPU_BACKENDS if name in steps]
        row["peak_bytes"] = {name: _peak(steps[name]) for name in (*ours, "eager")}
        if case.mode is Mode.FORWARD:
            graph = partial(triton.testing.do_bench_cudagraph, rep=20, return_mode="median")
            row["graph_seconds"] = {name: graph(steps[name]) / 1e3 for name in ours}
    return row


def main() -> None:
    """Measure all cases and write them as JSON, after each one what is there so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no case after so long")
    arguments = parser.parse_args()
    if library := os.environ.get("METAPOOL_CUDA_HOST"):
        cuda_host.load(library)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for case in cases(tiny=arguments.device == "cpu"):
        if time.perf_counter() - began > arguments.seconds:
            break
        try:
            rows.append(measure(case, arguments.device))
        except Exception as error:
            rows.append({"case": str(case), "error": f"{type(error).__name__}: {error}"})
        arguments.out.write_text(json.dumps(rows, indent=1))
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
