"""The training step of a whole MobileNetV2, plain, with our enhancers and with the eager mix, and a
step of the search.

Batch 256 of 224 x 224 images, bfloat16 autocast, channels_last.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benches.cases import EAGER_NETWORK, NO_CANDIDATES, OUR_NETWORK, PLAIN_NETWORK
from benches.gpu_check.figures import GPU_BACKENDS
from benches.gpu_check.search_step import SearchStep, make_accelerator
from benches.gpu_check.worker import Row, work
from benches.network import build_network, training_step
from metapool_kernels.search.machine.kernels import compile_ahead

_WARM, _TIMED = 3, 12


def _sizes(device: str) -> tuple[int, int]:
    """Batch and side of the images."""
    return (256, 224) if device == "cuda" else (2, 64)


def _time(step: Callable[[], object], device: str) -> dict[str, Any]:
    """Median seconds of a step, and on a GPU the most memory that was taken."""
    seconds = []
    on_gpu = device == "cuda"
    for _ in range(_WARM + _TIMED if on_gpu else 2):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found: dict[str, Any] = {"seconds": median(seconds[_WARM if on_gpu else 1 :])}
    return found | ({"peak bytes": torch.cuda.max_memory_allocated()} if on_gpu else {})


def _forget(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def training(kind: str, backend: str | None, device: str) -> dict[str, Any]:
    """The step of one of the networks."""
    _forget(device)
    batch, side = _sizes(device)
    model = build_network(kind, (3, side, side), backend)
    model.to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    autocast = partial(torch.autocast, "cuda", torch.bfloat16) if device == "cuda" else nullcontext
    step = training_step(model, x, labels, autocast)
    if kind not in (PLAIN_NETWORK, EAGER_NETWORK):

        def gradients() -> None:  # without an update by what has not been computed
            with autocast():
                loss = F.cross_entropy(model(x), labels)
            loss.backward()

        compile_ahead(gradients, make_accelerator(device))
    return _time(step, device)


def search(backend: str | None, device: str) -> dict[str, Any]:
    """The step of the search."""
    _forget(device)
    step = SearchStep(device, backend, *_sizes(device))
    compile_ahead(step.rehearse, step.accelerator)
    return _time(step, device)


def _rows(device: str) -> Iterator[Row]:
    """Those that compile nothing first."""
    backends = tuple(reversed(GPU_BACKENDS)) if device == "cuda" else (None,)
    yield PLAIN_NETWORK, lambda: training(PLAIN_NETWORK, None, device)
    for i, backend in enumerate(backends):
        by = f"{OUR_NETWORK}, {backend or 'on the CPU'}"
        yield by, lambda b=backend: training(OUR_NETWORK, b, device)
        if i == 0:
            yield EAGER_NETWORK, lambda: training(EAGER_NETWORK, None, device)
        yield f"a step of the search, {by}", lambda b=backend: search(b, device)
    yield NO_CANDIDATES, lambda: training(NO_CANDIDATES, backends[0], device)


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    work(_rows(parser.parse_args().device))


if __name__ == "__main__":
    main()
