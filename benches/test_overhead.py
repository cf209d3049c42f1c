"""What a call costs where the map is tiny: the time around the kernels."""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from metapool_kernels import DEFAULT_CANDIDATES, fused_meta_pool

CALLS = {
    "one F.avg_pool2d": lambda x, alpha: F.avg_pool2d(x, 3, 1, 1),
    "fused_meta_pool, 7 candidates": lambda x, alpha: fused_meta_pool(x, alpha),
    "fused_meta_pool, avg_pool_3x3": lambda x, alpha: fused_meta_pool(
        x, alpha[:1], ("avg_pool_3x3",)
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_overhead(benchmark: BenchmarkFixture, call: str, grad: bool) -> None:
    """A forward on 1 x 8 x 7 x 7; the eager mix makes about 20 calls such as the first."""
    x = torch.randn(1, 8, 7, 7)
    alpha = torch.randn(len(DEFAULT_CANDIDATES), requires_grad=grad)
    x.requires_grad_(grad)
    benchmark.group = f"overhead, {'grad' if grad else 'no grad'}"
    with torch.set_grad_enabled(grad):
        benchmark.pedantic(CALLS[call], (x, alpha), rounds=200, iterations=50, warmup_rounds=20)
