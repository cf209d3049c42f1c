"""Small maps whose elements lie more than 2**31 elements or 2**32 bytes apart in memory.

They lie in memory that is only reserved: what nobody touches costs nothing, so that 32 bits too few
show here and not only where a map is as large as that (test_large.py).
"""

import mmap

import numpy as np
import pytest
import torch
from torch import Tensor

from metapool_kernels import numpy_api
from tests import cases, judge
from tests.backends import DEVICE, skip_or_fail
from tests.cases import CANDIDATES, Case

RESERVED = 2**33 + 2**20
"""Bytes: more than 2**31 elements of float32."""

AXES = {
    "images": (0, (2, 3, 5, 4)),
    "channels": (1, (2, 3, 5, 4)),
    "rows": (2, (2, 3, 5, 4)),
    "columns": (3, (2, 3, 5, 4)),
    "rows_of_planes": (2, (3, 17, 6, 5)),
    "images_of_planes": (0, (3, 17, 6, 5)),
}
"""The axis along which elements are far apart, in few planes and in many, which are packed."""

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="copied to a GPU, a map is dense again")


@pytest.fixture(scope="module")
def memory() -> mmap.mmap:
    """Memory that is zeros and takes space only where it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return mmap.mmap(-1, RESERVED, flags=flags)
    except OSError as error:  # a limit on addresses, or a system that reserves what it gives
        pytest.skip(f"{RESERVED >> 30} GiB of addresses are needed: {error}")


def _spread(base: Tensor, axis: int, memory: mmap.mmap) -> Tensor:
    """A copy of a map: dense but for one axis, whose ends are as far apart as the memory goes."""
    storage = torch.frombuffer(memory, dtype=base.dtype)
    rest = base.select(axis, 0).numel()
    strides = list(base.select(axis, 0).contiguous().stride())
    strides.insert(axis, (len(storage) - rest) // (base.shape[axis] - 1))
    return storage.as_strided(base.shape, strides).copy_(base)


def _at_the_end(base: Tensor, memory: mmap.mmap) -> Tensor:
    """A dense copy of a map that begins more than 2**32 bytes into its memory."""
    storage = torch.frombuffer(memory, dtype=base.dtype)
    return storage[len(storage) - base.numel() :].view(base.shape).copy_(base)


def _judge(backend: str, case: Case, x: Tensor, alpha: Tensor, grad_out: Tensor) -> None:
    got = judge.run(judge.fused(backend), case, x, alpha, grad_out)
    judge.verdict(got, case, x, alpha, grad_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_x_far_apart(backend: str, axis: str, dtype: torch.dtype, memory: mmap.mmap) -> None:
    where, size = AXES[axis]
    case = Case(size, dtype)
    x, alpha, grad_out = case.tensors()
    far = _spread(x, where, memory)
    distance = far.stride(where) * (size[where] - 1)
    assert distance > 2**31 - 64 or distance * far.element_size() > 2**32
    _judge(backend, case, far, alpha, grad_out)


@pytest.mark.parametrize("axis", AXES)
def test_gradient_of_the_output_far_apart(backend: str, axis: str, memory: mmap.mmap) -> None:
    where, size = AXES[axis]
    case = Case(size)
    x, alpha, grad_out = case.tensors()
    _judge(backend, case, x, alpha, _spread(grad_out, where, memory))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["images", "channels", "candidates"])
def test_weights_far_apart(backend: str, axis: int, memory: mmap.mmap) -> None:
    case = Case((3, 17, 6, 5), normalize=None, alpha="nck")
    x, alpha, grad_out = case.tensors()
    _judge(backend, case, x, _spread(alpha, axis, memory), grad_out)


@pytest.mark.parametrize("names", ["default", "strips", "rectangular"])
@pytest.mark.parametrize("stride", [1, 2])
def test_other_kernels(backend: str, stride: int, names: str, memory: mmap.mmap) -> None:
    """Those for any window and stride, which have addresses of their own."""
    candidates = [name for name in CANDIDATES[names] if name != "skip_connect"]
    case = Case((2, 3, 5, 4), candidates=tuple(candidates), stride=stride)
    x, alpha, grad_out = case.tensors()
    for axis in (2, 3):
        _judge(backend, case, _spread(x, axis, memory), alpha, grad_out)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_x_that_begins_far_into_its_memory(
    backend: str, dtype: torch.dtype, memory: mmap.mmap
) -> None:
    case = Case((2, 17, 6, 5), dtype)
    x, alpha, grad_out = case.tensors()
    _judge(backend, case, _at_the_end(x, memory), alpha, grad_out)


def test_the_second_derivative_far_apart(native: str, memory: mmap.mmap) -> None:
    """It reads a map of values beside x."""
    case = Case((2, 17, 6, 5), alpha="nck")
    x, alpha, grad_out = case.tensors()

    def second(x: Tensor) -> tuple[Tensor, ...]:
        leaves = x.detach().requires_grad_(), alpha.detach().requires_grad_()
        out = judge.fused(native)(*leaves, case)
        (grad,) = torch.autograd.grad(out, leaves[0], grad_out, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves[1])

    (far,), (near,) = second(_spread(x, 2, memory)), second(x)
    assert torch.equal(judge.bits(far), judge.bits(near))


@pytest.mark.parametrize("axis", AXES)
def test_arrays_far_apart(axis: str, memory: mmap.mmap) -> None:
    """The same bits as for arrays that are dense."""
    try:
        numpy_api.isa_names()
    except RuntimeError as error:
        skip_or_fail(str(error))
    where, size = AXES[axis]
    x, alpha, grad_out = (tensor.numpy() for tensor in Case(size).tensors())
    far = _spread(torch.from_numpy(x), where, memory).numpy()
    assert far.strides[where] * (size[where] - 1) > 2**32
    near = numpy_api.meta_pool(x, alpha), *numpy_api.meta_pool_grad(grad_out, x, alpha)
    got = numpy_api.meta_pool(far, alpha), *numpy_api.meta_pool_grad(grad_out, far, alpha)
    for ours, expected in zip(got, near, strict=True):
        assert np.array_equal(ours, expected)
