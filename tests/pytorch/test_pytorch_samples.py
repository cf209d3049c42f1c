"""A suite that nobody here wrote: PyTorch's own samples of its two poolings drive our op.

Each sample input of ``avg_pool2d`` and ``max_pool2d`` that one candidate can express is given to
the op and to PyTorch; values, strides and gradients have to be the same. What differs on purpose
stands in two tables, with the number of samples that each row takes under the versions of PyTorch
for which they were counted. Under others, what is in no row is passed over.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool_kernels import fused_meta_pool
from tests import cases, recorded
from tests.backends import BACKENDS, require
from tests.pytorch import pytorch_internal

invocations = pytorch_internal.load("common_methods_invocations")

OPS = {"avg": "nn.functional.avg_pool2d", "max": "nn.functional.max_pool2d"}
VIEWS = ("as given", "noncontiguous")
AVG_ARGUMENTS = (
    "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
)  # fmt: skip


class Sample(NamedTuple):
    """A call of PyTorch's pooling, and what our op is asked for instead."""

    kind: str
    x: Tensor
    arguments: dict[str, Any]

    def pair(self, name: str) -> tuple[int, int]:
        value = self.arguments.get(name)
        if name == "stride" and value in (None, ()):
            return self.pair("kernel_size")
        value = {"padding": 0, "dilation": 1}.get(name) if value is None else value
        both = (value,) if isinstance(value, int) else tuple(value)
        return (both[0], both[-1])

    @property
    def scale(self) -> float:
        """The weight that turns the divisor of a whole window into the one that is asked for."""
        divisor = self.arguments.get("divisor_override")
        kh, kw = self.pair("kernel_size")
        return 1.0 if divisor is None else kh * kw / divisor

    def theirs(self) -> Tensor:
        function = F.avg_pool2d if self.kind == "avg" else F.max_pool2d
        kept = {k: v for k, v in self.arguments.items() if k != "return_indices"}
        out: Tensor = function(self.x, **kept)
        return out

    def ours(self, backend: str) -> Tensor:
        """One candidate; cut out at stride 1 where the padding is another than half the window."""
        (kh, kw), stride, padding = (self.pair(n) for n in ("kernel_size", "stride", "padding"))
        begin = (kh // 2 - padding[0], kw // 2 - padding[1])
        counts = self.arguments.get("count_include_pad", True)
        whole = self.arguments.get("divisor_override") is not None
        out = fused_meta_pool(
            self.x,
            torch.tensor([self.scale]),
            [f"{self.kind}_pool_{kh}x{kw}"],
            normalize=None,
            stride=stride if begin == (0, 0) else 1,
            count_include_pad=counts or whole,
            backend=backend,
        )
        if begin == (0, 0):
            return out
        rows, columns = (
            slice(first, size - first, step)
            for first, size, step in zip(begin, self.x.shape[-2:], stride, strict=True)
        )
        return out[..., rows, columns]


def how(sample: Sample) -> str:
    """Whether the op can express a sample, or the first thing that it leaves out on purpose."""
    kernel, padding = sample.pair("kernel_size"), sample.pair("padding")
    if any(size % 2 == 0 for size in kernel):
        return "even window"
    if sample.pair("dilation") != (1, 1):
        return "dilation"
    if _with_ceil(sample, True) != _with_ceil(sample, False) and sample.arguments["ceil_mode"]:
        return "ceil_mode that adds a window"
    return "as it is" if padding == (kernel[0] // 2, kernel[1] // 2) else "cut out"


def _with_ceil(sample: Sample, ceil_mode: bool) -> torch.Size:
    arguments = sample.arguments | {"ceil_mode": ceil_mode}
    return sample._replace(arguments=arguments).theirs().shape


@cache
def samples(kind: str, dtype: torch.dtype, view: str) -> tuple[Sample, ...]:
    return tuple(_samples(kind, dtype, view))


def _samples(kind: str, dtype: torch.dtype, view: str) -> Iterator[Sample]:
    (info,) = (info for info in invocations.op_db if info.name == OPS[kind])
    torch.manual_seed(0)
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        drawn = sample.noncontiguous() if view == "noncontiguous" else sample
        arguments = dict(zip(AVG_ARGUMENTS, drawn.args, strict=False)) | drawn.kwargs
        yield Sample(kind, drawn.input, arguments)


NUMBER = {
    "avg": {"as it is": 2, "cut out": 1, "even window": 4},
    "max": {
        "as it is": 140,
        "cut out": 90,
        "even window": 720,
        "dilation": 360,
        "ceil_mode that adds a window": 130,
    },
}
"""How many of PyTorch's samples fall where. The contract leaves out even windows, dilation and
``ceil_mode``; padding is half the window, so that every candidate keeps the size of the map."""


@pytest.mark.parametrize("kind", OPS)
def test_every_sample_is_driven_or_left_out_on_purpose(kind: str) -> None:
    recorded.require_counted_torch()
    found = Counter(map(how, samples(kind, torch.float32, VIEWS[0])))
    assert found == NUMBER[kind]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("name", BACKENDS)
def test_as_pytorch(name: str, kind: str, dtype: torch.dtype, view: str) -> None:
    """Values (maxima to the bit), strides and gradients."""
    require(name)
    driven = 0
    for sample in samples(kind, dtype, view):
        way = how(sample)
        if way not in ("as it is", "cut out"):
            continue
        driven += 1
        expected, got = sample.theirs(), sample.ours(name)
        exact = {"rtol": 0.0, "atol": 0.0} if kind == "max" else {}
        torch.testing.assert_close(got, expected, check_stride=way == "as it is", **exact)
        cotangent = torch.randn_like(expected)
        (grad,) = torch.autograd.grad(got, sample.x, cotangent)
        torch.testing.assert_close(grad, _their_gradient(sample, cotangent))
    if recorded.torch_is_counted():
        assert driven == NUMBER[kind]["as it is"] + NUMBER[kind]["cut out"]
    assert driven > 0


def _their_gradient(sample: Sample, cotangent: Tensor) -> Tensor:
    """PyTorch rounds half precision after every addition; it is asked in float64 there."""
    dtype = sample.x.dtype
    wide = dtype if torch.finfo(dtype).bits >= 32 else torch.float64
    asked = sample._replace(x=sample.x.detach().to(wide).requires_grad_())
    (right,) = torch.autograd.grad(asked.theirs(), asked.x, cotangent.to(wide))
    return right.to(dtype)


SAME = "as PyTorch"
NO_SUCH_ARGUMENT = "the op has no such argument: padding is half the window, the divisor its area"
WINDOW_OVER_MAP = "a window larger than the map is fine; this one is even besides"
ERRORS: dict[tuple[str, str], tuple[str, type[Exception], str, int]] = {
    ("avg", "pad must be non-negative"): (NO_SUCH_ARGUMENT, ValueError, "odd and from 1 to 15", 2),
    ("avg", "pad should be at most half"): (
        NO_SUCH_ARGUMENT, ValueError, "odd and from 1 to 15", 2,
    ),
    ("avg", "divisor must be not zero"): (NO_SUCH_ARGUMENT, ValueError, "odd and from 1 to 15", 1),
    ("max", "pad must be non-negative"): (NO_SUCH_ARGUMENT, ValueError, "odd and from 1 to 15", 2),
    ("max", "pad should be at most half"): (
        NO_SUCH_ARGUMENT, ValueError, "odd and from 1 to 15", 2,
    ),
    ("max", r"Expected 3D or 4D \(batch mode\)"): (
        SAME, RuntimeError, "x should have non-zero channels, height and width", 2,
    ),
    ("max", "Output size is too small"): (WINDOW_OVER_MAP, ValueError, "odd and from 1 to 15", 1),
}  # fmt: skip
"""For each of PyTorch's error inputs, by the beginning of its message: whether the class of ours is
PyTorch's or why not, ours, its message, and how many there are."""


def _error_inputs(kind: str) -> Iterator[tuple[tuple[str, str], Any]]:
    (info,) = (info for info in invocations.op_db if info.name == OPS[kind])
    for error in info.error_inputs("cpu"):
        rows = [key for key in ERRORS if key[0] == kind and error.error_regex.startswith(key[1])]
        assert rows or not recorded.torch_is_counted(), f"no row is for {error.error_regex!r}"
        yield from ((row, error) for row in rows)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_pytorch_refuses(name: str, kind: str) -> None:
    """The nearest call of ours is refused too."""
    require(name)
    found: Counter[tuple[str, str]] = Counter()
    for row, error in _error_inputs(kind):
        found[row] += 1
        reason, ours, message, _ = ERRORS[row]
        sample = Sample(kind, error.sample_input.input, error.sample_input.kwargs)
        with pytest.raises(error.error_type):
            sample.theirs()
        assert (ours is error.error_type) == (reason == SAME)
        (kh, kw), stride = sample.pair("kernel_size"), sample.pair("stride")
        window = f"{kind}_pool_{kh}x{kw}"
        with pytest.raises(ours, match=message) as raised:
            fused_meta_pool(sample.x, torch.ones(1), [window], stride=stride, backend=name)
        assert type(raised.value) is ours
    if recorded.torch_is_counted():
        assert found == {row: ERRORS[row][3] for row in ERRORS if row[0] == kind}
    assert found


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("name", BACKENDS)
def test_dtypes_of_pytorch(name: str, kind: str) -> None:
    """Integers, which PyTorch pools by truncating, are refused: a mixture of them is none."""
    require(name)
    (info,) = (info for info in invocations.op_db if info.name == OPS[kind])
    floating = {dtype for dtype in info.dtypes if dtype.is_floating_point}
    assert floating == set(cases.DTYPES) or not recorded.torch_is_counted()
    for dtype in info.dtypes - floating:
        x = torch.ones(1, 1, 4, 4, dtype=dtype)
        with pytest.raises(NotImplementedError, match='"fused_meta_pool" not implemented for'):
            fused_meta_pool(x, torch.ones(1), [f"{kind}_pool_3x3"], backend=name)
