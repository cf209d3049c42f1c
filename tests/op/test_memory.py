"""What a call keeps: x and the weights, and nothing pooled."""

import ctypes
import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metapool_kernels import fused_meta_pool, native, numpy_api
from tests import cases
from tests.backends import require
from tests.cases import Case

ROOT = Path(__file__).parents[2]


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
from metapool_kernels import fused_meta_pool, fused_multi_pool, fused_normalized_meta_pool

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

form, mode = sys.argv[1:]
backward = mode == "backward"
x = torch.randn(8, 32, 128, 128, requires_grad=backward)  # 16 MiB
alpha = torch.randn(31, requires_grad=backward)
names = ("max_pool_3x3", "avg_pool_3x3") * 15 + ("skip_connect",)

def call(x):
    if form == "stack":
        out = fused_multi_pool(x, names[:4], backend="cpu")
    elif form == "normalized":
        out = fused_normalized_meta_pool(x, alpha, names, training=True, backend="cpu")
    else:
        out = fused_meta_pool(x, alpha, names, backend="cpu")
    if backward:
        leaves = (x,) if form == "stack" else (x, alpha)
        torch.autograd.grad(out, leaves, torch.ones(()).expand_as(out))

call(x[:1])
before = peak()
call(x)
print(peak() - before)
"""


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("form, outputs", [("mix", 1), ("normalized", 1), ("stack", 4)])
def test_no_pooled_map_is_ever_made(form: str, outputs: int, mode: str) -> None:
    """The peak grows by the output (and grad x), not by a map for each of the K candidates.

    In a process of its own, as the peak of this one was set by other tests.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, form, mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    maps = outputs + (mode == "backward")
    assert float(done.stdout) < 16 * (maps + 0.75)


def _resident() -> int:
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@pytest.mark.usefixtures("native")
@NEEDS_PROC
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


CALLS = 10_000
LEAKS = {"resident": CALLS * 64, "allocated": CALLS * 32, "objects": CALLS}
"""What it costs if each call loses something: malloc hands out no less than 32 bytes and may find
room for them in a page that is resident already, for 64 it needs new ones. Half is not flat."""


class _MallInfo(ctypes.Structure):
    """What mallinfo2 of glibc returns; ``uordblks`` is what has been allocated and not freed."""

    _fields_ = [(f"before{i}", ctypes.c_size_t) for i in range(7)] + [
        (name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")
    ]


PATHS = {
    "streamed": Case((1, 16, 2, 3), candidates=("max_pool_3x3", "avg_pool_3x3")),
    "general": Case((1, 2, 3, 2), candidates=("max_pool_1x3", "avg_pool_3x1"), normalize=None),
}


def _in_use() -> dict[str, int]:
    """Memory that is in use, but for what is free and kept for later."""
    gc.collect()
    libc, found = ctypes.CDLL(None), {"objects": sys.getallocatedblocks()}
    if hasattr(libc, "mallinfo2"):  # glibc 2.33
        libc.mallinfo2.restype = _MallInfo
        found["allocated"] = libc.mallinfo2().uordblks
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return found | {"resident": _resident()}


def _assert_flat(call: Callable[[], object]) -> None:
    """Fail where memory grows with the calls. A leak does so each time, a cache that fills once."""
    for _ in range(500):
        call()
    seen = []
    for _ in range(3):
        before = _in_use()
        for _ in range(CALLS):
            call()
        grown = {name: now - before[name] for name, now in _in_use().items()}
        if all(more < LEAKS[name] // 2 for name, more in grown.items()):
            return
        seen.append(grown)
    pytest.fail(f"what {CALLS} calls have left, three times over: {seen}")


@NEEDS_PROC
@pytest.mark.parametrize(
    ("backend", "path", "layout"),
    [
        *product(["cpu"], PATHS, cases.NATIVE_LAYOUTS),
        ("reference", "streamed", "contiguous"),
        ("reference", "general", "channels_last"),
    ],
)
def test_ten_thousand_calls_leave_nothing(backend: str, path: str, layout: str) -> None:
    require(backend)
    case = replace(PATHS[path], layout=layout)
    x, alpha, grad_out = case.tensors()
    leaves = x.requires_grad_(), alpha.requires_grad_()

    def call() -> None:
        out = fused_meta_pool(*leaves, case.candidates, normalize=case.normalize, backend=backend)
        torch.autograd.grad(out, leaves, grad_out)

    _assert_flat(call)


def _second_derivatives() -> None:
    x, alpha = torch.ones(1, 2, 3, 2, requires_grad=True), torch.ones(7, requires_grad=True)
    out = fused_meta_pool(x, alpha, backend="cpu")
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    torch.autograd.grad(grad, alpha, torch.ones_like(grad))


def _numpy_calls() -> None:
    x, alpha, grad_out = (tensor.numpy() for tensor in Case((1, 2, 3, 2)).tensors())
    numpy_api.meta_pool(x, alpha)
    numpy_api.meta_pool_grad(grad_out, x, alpha)


def _numpy_refusals() -> None:
    x, weights = np.ones((1, 1, 2, 2), np.float32), np.ones((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="weights"):
        native.numpy_ops().meta_pool_fwd(x, weights, x, None, [], 1, 1, True)


def _torch_refusals() -> None:
    with pytest.raises(RuntimeError, match="elements"):
        fused_meta_pool(torch.ones(1, 1, 2, 2), torch.ones(3), ("none",), backend="cpu")
    with pytest.raises(RuntimeError, match="weights should have shape"):
        torch.ops.metapool_kernels.meta_pool_fwd(
            torch.ones(1, 1, 2, 2), torch.ones(3), None, [1], [1, 1], True, False
        )


@NEEDS_PROC
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "call", [_second_derivatives, _numpy_calls, _numpy_refusals, _torch_refusals]
)
def test_ten_thousand_others_leave_nothing(call: Callable[[], None]) -> None:
    """Second derivatives, the NumPy functions, and what is refused in Python and in C++."""
    _assert_flat(call)
