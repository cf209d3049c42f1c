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
