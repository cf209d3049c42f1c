"""One case: inputs, the check that withholds figures, and the interleaved times of all peers.

``python -m benches.measure POSITION [--quick] [--system-malloc]`` prints one case of the report as
JSON: an instruction set can only be forced before the first call in a process.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches.cases import Case, Mode, report_cases
from benches.peers import COUNT_INCLUDE_PAD, STRIDE, Peer, Product, Run, eager, peers_for
from benches.timing import QUICK, Effort, Times, interleave, keep_memory
from metapool_kernels import reference
from metapool_kernels.candidates import Kind, parse_candidates
from tests.cases import DATA

ROOT = Path(__file__).parents[1]
_DRAWN = 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative error in norm: a wrong border or tie is far above it, rounding far below."""


@dataclass(frozen=True)
class Result:
    """Times of a case by peer, and why others have none."""

    case: Case
    times: dict[str, Times]
    withheld: dict[str, str]


@lru_cache(maxsize=2)  # of a case come several peers, in two layouts
def _drawn(data: str, size: tuple[int, ...], weights: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, grad_out = DATA[data](size, rng), torch.randn(size, generator=rng)
    return x, torch.randn(weights, generator=rng).softmax(0), grad_out


def inputs(
    case: Case, layout: torch.memory_format, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """``x``, the weights (K,) in float32 or as wide as x, and a gradient of the output.

    On a GPU a batch repeats its first images: to draw all of them would take longer than all else.
    """
    images = case.batch if device == "cpu" else min(case.batch, _DRAWN)
    times = -(-case.batch // images)

    def of_batch(drawn: Tensor) -> Tensor:  # which is a copy in any case
        whole = drawn.to(device, case.dtype).repeat(times, 1, 1, 1)[: case.batch]
        return whole.contiguous(memory_format=layout)

    x, weights, grad_out = _drawn(case.data, (images, *case.size), len(case.names))
    wide = torch.promote_types(case.dtype, torch.float32)
    return of_batch(x), weights.to(device, wide, copy=True), of_batch(grad_out)


def make_step(
    run: Run, mode: Mode, x: Tensor, weights: Tensor, grad_out: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: a call without arguments that gives all tensors asked for."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = run(x, weights)
        return out if isinstance(out, tuple) else (out,)

    if mode is Mode.FORWARD:
        return forward
    wanted = {Mode.X_ONLY: (x,), Mode.WEIGHTS_ONLY: (weights,)}.get(mode, (x, weights))
    for tensor in wanted:
        tensor.requires_grad_()

    def backward() -> tuple[Tensor, ...]:
        out = run(x, weights)
        return (out.detach(), *torch.autograd.grad(out, wanted, grad_out))

    def double() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(run(x, weights), wanted, grad_out, create_graph=True)
        squares = torch.stack([grad.square().sum() for grad in grads])
        return torch.autograd.grad(squares.sum(), wanted)

    return double if mode is Mode.DOUBLE else backward


def _parts(names: tuple[str, ...]) -> Run:
    """The definition of each pooling alone."""
    parsed = [c for c in parse_candidates(names) if c.kind is not Kind.SKIP]
    return lambda x, weights: tuple(
        reference.pool(x, candidate, STRIDE, COUNT_INCLUDE_PAD) for candidate in parsed
    )


@lru_cache(maxsize=1)  # of one case come several peers
def _truth(case: Case, product: Product, device: str) -> tuple[Tensor, ...]:
    """What a case gives by the definition in float64."""
    definition = eager if product is Product.MIX else _parts
    tensors = inputs(case, torch.contiguous_format, device)
    return make_step(definition(case.names), case.mode, *(t.double() for t in tensors))()


def problem(case: Case, peer: Peer, device: str = "cpu") -> str | None:
    """Why the figures of a peer are withheld: what it gets wrong, or None.

    On the CPU on the first image; on a GPU on all of them, for which other kernels may run.
    """
    if peer.product is Product.COPY:
        return None
    if not peer.routes_ties and case.mode is not Mode.FORWARD:
        case = replace(case, data="distinct")
    if device == "cpu":
        case = replace(case, batch=1)
    truth = _truth(case, peer.product, device)
    x, weights, grad_out = inputs(case, peer.layout, device)
    try:
        with torch.device(device):
            run = peer.make(case.names)
        got = make_step(run, case.mode, x, weights, grad_out)()
    except RuntimeError as error:  # such as torch.compile without a C++ compiler
        return f"fails: {str(error).splitlines()[0]}"
    if len(got) != len(truth):
        return f"gives {len(got)} tensors and not {len(truth)}"
    for position, (one, other) in enumerate(zip(got, truth, strict=True)):
        off = float((one.double() - other).norm() / other.norm().clamp_min(1e-30))
        if not off <= TOLERANCE[case.dtype]:  # NaN is off as well
            return f"tensor {position} is off by {off:.1e} of its norm"
    return None


def measure(case: Case, effort: Effort, peers: Mapping[str, Peer] | None = None) -> Result:
    """Check and time the peers of a case (by default all that suit it), interleaved."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    try:
        return _measure(case, effort, peers_for(case) if peers is None else peers)
    finally:
        torch.set_num_threads(before)


def _measure(case: Case, effort: Effort, peers: Mapping[str, Peer]) -> Result:
    problems = {name: problem(case, peer) for name, peer in peers.items()}
    withheld = {name: reason for name, reason in problems.items() if reason is not None}
    shared = {layout: inputs(case, layout) for layout in {peer.layout for peer in peers.values()}}
    runs: dict[str, Callable[[], object]] = {}
    for name, peer in peers.items():
        mode = Mode.FORWARD if peer.product is Product.COPY else case.mode
        step = make_step(peer.make(case.names), mode, *shared[peer.layout])
        if name not in withheld:
            runs[name] = step
    return Result(case, interleave(runs, effort), withheld)


def measure_apart(position: int, case: Case, quick: bool, system_malloc: bool) -> Result:
    """:func:`measure` in a process where the instruction set of the case is forced."""
    options = ["--quick"] * quick + ["--system-malloc"] * system_malloc
    done = subprocess.run(
        [sys.executable, "-m", "benches.measure", str(position), *options],
        cwd=ROOT,
        env={**os.environ, "METAPOOL_ISA": case.isa or ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    read: dict[str, Any] = json.loads(done.stdout)
    times = {name: Times(**values) for name, values in read["times"].items()}
    return Result(case, times, read["withheld"])


def main() -> None:
    """Measure one case and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("position", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--system-malloc", action="store_true")
    arguments = parser.parse_args()
    if not arguments.system_malloc:
        keep_memory()
    case = report_cases(arguments.quick)[arguments.position]
    result = measure(case, QUICK if arguments.quick else Effort())
    times = {name: asdict(value) for name, value in result.times.items()}
    print(json.dumps({"times": times, "withheld": result.withheld}))


if __name__ == "__main__":
    main()
