"""Strides: what aten's pooling returns for the same input, on every backend and without data."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from metapool_kernels import fused_meta_pool
from metapool_kernels.layout import output_size
from tests import cases
from tests.cases import CANDIDATES, SHAPES, Case

NAMES = ("max_pool_3x3", "avg_pool_3x3")
SIZES = [
    "primes",
    "gray",
    "pixels",
    "one",
    "row",
    "column",
    "no_batch",
    "no_batch_gray",
    "map7",
    "planes",
]
GRID = [
    Case(SHAPES[size][0], dtype, layout, candidates=NAMES, stride=stride)
    for size in SIZES
    for layout in cases.LAYOUTS
    for dtype, stride in ((torch.float32, 1), (torch.float32, (2, 20)), (torch.bfloat16, 1))
]


def _aten(x: Tensor, case: Case) -> Tensor:
    return F.avg_pool2d(x, 3, case.stride, 1)


def _ours(x: Tensor, case: Case, backend: str) -> Tensor:
    alpha = torch.zeros(2, device=x.device, dtype=x.dtype)
    return fused_meta_pool(x, alpha, NAMES, stride=case.stride, backend=backend)


def _strides(function, x: Tensor) -> tuple[tuple[int, ...], ...]:  # type: ignore[no-untyped-def]
    """Of the output, and of the gradient for incoming ones of either layout."""
    x = x.detach().requires_grad_()
    out = function(x)
    grads = [
        torch.autograd.grad(out, x, torch.ones_like(out, memory_format=layout), retain_graph=True)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    return (out.stride(), *(grad.stride() for (grad,) in grads))


@pytest.mark.parametrize("case", GRID, ids=str)
def test_strides_are_those_of_aten(backend: str, case: Case) -> None:
    x, _, _ = case.tensors()
    got = _strides(lambda x: _ours(x, case, backend), x)
    assert got == _strides(lambda x: _aten(x, case), x)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_meta_tensors_have_the_same_strides(backend: str, case: Case) -> None:
    x, _, _ = case.tensors()
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    expected = _ours(x, case, backend)
    got = _ours(meta, case, backend)
    assert got.device.type == "meta"
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert got.stride() == expected.stride()
    assert _strides(lambda x: _ours(x, case, backend), meta) == _strides(
        lambda x: _ours(x, case, backend), x
    )


@pytest.mark.parametrize("case", GRID, ids=str)
def test_fake_tensors_have_the_same_strides(backend: str, case: Case) -> None:
    x, _, _ = case.tensors()
    expected = _strides(lambda x: _ours(x, case, backend), x)
    with FakeTensorMode() as mode:
        assert _strides(lambda x: _ours(x, case, backend), mode.from_tensor(x)) == expected


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_three_dimensions_give_contiguous_samples(backend: str, layout: str) -> None:
    x, _, _ = Case(layout=layout).tensors()
    out = fused_meta_pool(x[0], torch.zeros(7), backend=backend)
    assert out.stride() == F.avg_pool2d(x[0], 1).stride()


def test_channels_last_output_needs_no_copy(backend: str) -> None:
    x, alpha, _ = Case(layout="channels_last").tensors()
    out = fused_meta_pool(x, alpha, backend=backend)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()


@pytest.mark.parametrize("stride", [1, 2, 3, (1, 4), (50, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 3, 7, 15])
def test_output_size_does_not_depend_on_the_window(
    stride: int | tuple[int, int], window: int
) -> None:
    steps = stride if isinstance(stride, tuple) else (stride, stride)
    for h in range(1, 20):
        aten = F.avg_pool2d(torch.zeros(1, 1, h, 9), window, steps, window // 2)
        assert output_size((h, 9), steps) == tuple(aten.shape[2:])


@pytest.mark.parametrize("layout", ["sliced", "stepped", "offset", "sliced_channels_last"])
def test_what_lies_between_is_not_touched(backend: str, layout: str) -> None:
    """The NaN around a slice neither enters the output nor is overwritten."""
    x, alpha, _ = Case(layout=layout, candidates=CANDIDATES["default"]).tensors()
    storage = x.untyped_storage()
    before = bytes(storage)
    out = fused_meta_pool(x, alpha, backend=backend)
    assert out.isfinite().all()
    assert bytes(storage) == before
