"""Forward and forward + backward of the op and its peers on MobileNetV2's feature maps.

``pytest benches/ --benchmark-only`` takes under 5 minutes on two cores, with ``--quick`` under one.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benches.peers import COPY, PEERS
from metapool_kernels import reference
from metapool_kernels.candidates import parse_candidates
from tests.cases import CANDIDATES, MOBILENET_V2_MAPS

LARGE, *_, SMALL = MOBILENET_V2_MAPS  # 96 x 56 x 56 and 960 x 7 x 7
MIDDLE = (384, 14, 14)
assert MIDDLE in MOBILENET_V2_MAPS

CASES = {
    f"{kind} on {'x'.join(map(str, size))}": (kind, size)
    for kind, size in (
        ("default", LARGE),
        ("avg", LARGE),
        ("max", LARGE),
        ("default", MIDDLE),
        ("default", SMALL),
    )
}
BATCH, QUICK_BATCH = 32, 4


def _inputs(peer: str, size: tuple[int, int, int], count: int, batch: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *size, generator=rng).mul(4).clamp(0, 6)  # as after ReLU6: with ties
    grad_out = torch.randn(batch, *size, generator=rng)
    weights = torch.randn(count, generator=rng).softmax(0)
    layout = PEERS[peer][1]
    return x.to(memory_format=layout), weights, grad_out.to(memory_format=layout)


def _check(peer: str, kind: str, size: tuple[int, int, int]) -> None:
    """Withhold the figures of a peer that computes something else."""
    names = CANDIDATES[kind]
    x, weights, _ = _inputs(peer, size, len(names), batch=1)
    out = PEERS[peer][0](names)(x, weights)
    truth = reference.mix(x.double(), weights.double(), parse_candidates(names), (1, 1), True)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)


def _rounds(peer: str, quick: bool) -> int:
    if quick:
        return 5
    return 5 if "eager" in peer or "compile" in peer else 20


def _skip_slow(peer: str, case: str, quick: bool) -> None:
    if quick and (case != next(iter(CASES)) or peer == "torch.compile"):
        pytest.skip("left out by --quick")
    if peer == "torch.compile" and case != next(iter(CASES)):
        pytest.skip("compiled for the first case only: each takes half a minute to compile")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def test_forward(benchmark: BenchmarkFixture, peer: str, case: str, quick: bool) -> None:
    """Forward without gradients."""
    _skip_slow(peer, case, quick)
    kind, size = CASES[case]
    if peer != COPY:
        _check(peer, kind, size)
    batch = QUICK_BATCH if quick else BATCH
    x, weights, _ = _inputs(peer, size, len(CANDIDATES[kind]), batch)
    run = PEERS[peer][0](CANDIDATES[kind])
    benchmark.group = f"forward, {case}, batch {batch}"
    with torch.no_grad():
        benchmark.pedantic(run, (x, weights), rounds=_rounds(peer, quick), warmup_rounds=1)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def test_forward_backward(benchmark: BenchmarkFixture, peer: str, case: str, quick: bool) -> None:
    """Forward and backward, with gradients of x and of the weights."""
    _skip_slow(peer, case, quick)
    kind, size = CASES[case]
    if peer != COPY:
        _check(peer, kind, size)
    batch = QUICK_BATCH if quick else BATCH
    x, weights, grad_out = _inputs(peer, size, len(CANDIDATES[kind]), batch)
    x.requires_grad_()
    weights.requires_grad_()
    run = PEERS[peer][0](CANDIDATES[kind])

    def step() -> None:
        out = run(x, weights)
        torch.autograd.grad(out, (x, weights), grad_out, allow_unused=peer == COPY)

    benchmark.group = f"forward + backward, {case}, batch {batch}"
    benchmark.pedantic(step, rounds=_rounds(peer, quick), warmup_rounds=1)
