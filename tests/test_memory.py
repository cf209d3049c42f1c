"""What a call keeps: x and the weights, and nothing pooled."""

import gc
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metapool_kernels import fused_meta_pool
from tests import cases
from tests.cases import Case

ROOT = Path(__file__).parents[1]


def _saved(case: Case, x: Tensor, alpha: Tensor) -> dict[int, int]:
    """Storages that autograd keeps for backward: address to size in bytes."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fused_meta_pool(x, alpha, case.candidates, backend="cpu", **case.options)
    assert out.requires_grad
    return kept


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("leaf", ["x", "alpha", "both"])
def test_raw_weights_save_x_and_alpha_alone(leaf: str, dtype: torch.dtype, layout: str) -> None:
    case = Case(dtype=dtype, layout=layout, normalize=None)
    x, alpha, _ = case.tensors()
    x.requires_grad_(leaf != "alpha")
    alpha.requires_grad_(leaf != "x")
    assert set(_saved(case, x, alpha)) <= {_address(x), _address(alpha)}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("alpha_shape", cases.ALPHA_SHAPES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_softmax_saves_x_and_the_weights_alone(dtype: torch.dtype, alpha_shape: str) -> None:
    case = Case(dtype=dtype, alpha=alpha_shape)
    x, alpha, _ = case.tensors()
    kept = _saved(case, x.requires_grad_(), alpha.requires_grad_())
    assert _address(x) in kept
    wide = 8 if dtype is torch.float64 else 4
    others = [size for address, size in kept.items() if address != _address(x)]
    assert others and all(size == alpha.numel() * wide for size in others)
    assert len(others) == 1


_PEAK = """
import resource, sys, torch
from metapool_kernels import fused_meta_pool

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

backward = sys.argv[1] == "backward"
x = torch.randn(8, 32, 128, 128, requires_grad=backward)  # 16 MiB
alpha = torch.randn(31, requires_grad=backward)
names = ("max_pool_3x3", "avg_pool_3x3") * 15 + ("skip_connect",)

def call(x):
    out = fused_meta_pool(x, alpha, names, backend="cpu")
    if backward:
        torch.autograd.grad(out, (x, alpha), torch.ones(()).expand_as(out))

call(x[:1])
before = peak()
call(x)
print(peak() - before)
"""


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("mode, maps", [("forward", 1), ("backward", 2)])
def test_no_pooled_map_is_ever_made(mode: str, maps: int) -> None:
    """The peak grows by the output (and grad x), not by a map for each of the K candidates.

    In a process of its own, as the peak of this one was set by other tests.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, mode], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 16 * (maps + 0.75)


def _resident() -> int:
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_many_calls_do_not_grow() -> None:
    x = torch.randn(2, 16, 64, 64, requires_grad=True)
    alpha = torch.randn(7, requires_grad=True)

    def call() -> None:
        out = fused_meta_pool(x, alpha, backend="cpu")
        torch.autograd.grad(out.sum(), (x, alpha))

    for _ in range(20):
        call()
    gc.collect()
    objects, before = len(gc.get_objects()), _resident()
    for _ in range(100):
        call()
    gc.collect()
    assert _resident() - before < 8 << 20  # one leaked map would be 50 MiB
    assert len(gc.get_objects()) - objects < 100
