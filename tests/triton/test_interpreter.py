"""What the tests mend in Triton's interpreter; `make test-interpreter` runs them."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.every

LARGEST = torch.iinfo(torch.int32).max
OPERATIONS = {
    "add": (lambda a, b: a + b, LARGEST - 1, 2),
    "sub": (lambda a, b: a - b, -LARGEST, 2),
    "mul": (lambda a, b: a * b, 2**16, 2**15),
}


@triton.jit
def _combine(a: Any, b: Any, out: Any, operation: tl.constexpr, size: tl.constexpr) -> None:
    lanes = tl.arange(0, size)
    left = tl.load(a + lanes)
    right = tl.load(b + lanes)
    if operation == "add":
        result = left + right
    elif operation == "sub":
        result = left - right
    else:
        result = left * right
    tl.store(out + lanes, result)


@triton.jit
def _convert(x: Any, out: Any, size: tl.constexpr) -> None:
    lanes = tl.arange(0, size)
    tl.store(out + lanes, tl.load(x + lanes).to(out.dtype.element_ty))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_integers_that_overflow_are_noticed(operation: str) -> None:
    function, left, right = OPERATIONS[operation]
    a = torch.full((8,), left // 2, dtype=torch.int32)
    b = torch.full((8,), right // 2, dtype=torch.int32)
    out = torch.empty_like(a)
    _combine[(1,)](a, b, out, operation, 8)
    assert torch.equal(out, function(a, b))

    a[5], b[5] = left, right
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
        _combine[(1,)](a, b, out, operation, 8)


def test_bfloat16_is_rounded_as_on_a_gpu() -> None:
    """To the nearest, denormal numbers too, and back without a loss."""
    size = 8192
    bits = torch.arange(size) * (2**31 // size) + torch.arange(size)
    bits = torch.cat([bits[::2], bits[1::2] - 2**31]).to(torch.int32)
    x = bits.view(torch.float32)
    narrow = torch.empty(size, dtype=torch.bfloat16)
    _convert[(1,)](x, narrow, size)
    expected = x.to(torch.bfloat16)
    torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)
    wide = torch.empty(size)
    _convert[(1,)](narrow, wide, size)
    torch.testing.assert_close(wide, expected.float(), rtol=0, atol=0, equal_nan=True)


def test_a_type_that_is_kept_is_the_one_that_was_asked_for() -> None:
    pairs = [(element, shape) for element in (tl.int32, tl.float64) for shape in ([8], [2, 4])]
    for element, shape in pairs * 2:
        found = tl.block_type(element, shape)
        assert found.element_ty == found.scalar == element and [*found.shape] == shape
        value = tl.tensor(None, found)
        assert [size.value for size in value.shape] == shape and value.numel.value == 8
        assert value.type is found and value.dtype == element
        scalar = tl.tensor(None, element)
        assert not [*scalar.shape] and scalar.numel.value == 1 and scalar.dtype == element
        pointer = tl.pointer_type(element, const=True)
        assert tl.block_type(pointer, shape).element_ty is pointer
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.int32, [6])


@triton.jit
def _spread(column: Any, row: Any, out: Any, size: tl.constexpr, width: tl.constexpr) -> None:
    lanes = tl.arange(0, size)
    others = tl.arange(0, width)
    sums = tl.load(column + lanes)[:, None] + tl.load(row + others)[None, :]
    tl.store(out + lanes[:, None] * width + others[None, :], sums)


def test_blocks_of_different_shapes_are_broadcast() -> None:
    column, row = torch.randn(8), torch.randn(4).double()
    out = torch.empty(8, 4, dtype=torch.float64)
    _spread[(1,)](column, row, out, 8, 4)
    assert torch.equal(out, column.double()[:, None] + row)


@triton.jit
def _add_flat(a: Any, b: Any, out: Any) -> None:
    tl.store(out + tl.arange(0, 8), tl.load(a + tl.arange(0, 8)) + tl.load(b + tl.arange(0, 4)))


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Exception, match="incompatible dimensions"):
        _add_flat[(1,)](torch.ones(8), torch.ones(4), torch.empty(8))
