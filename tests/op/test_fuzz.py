"""Calls that nobody thought of, drawn by hypothesis; what it finds becomes a case by name.

500 and more of each backend in CI; ``make fuzz`` draws 20,000.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metapool_kernels import numpy_api
from metapool_kernels.candidates import MAX_WINDOW
from tests import cases, judge
from tests.backends import BACKENDS, INTERPRETED, require
from tests.cases import Case, Layout, View
from tests.op import witness

ODD = st.integers(0, MAX_WINDOW // 2).map(lambda half: 2 * half + 1)
POOLINGS = st.builds(
    lambda kind, kh, kw: f"{kind}_pool_{kh}x{kw}", st.sampled_from(("avg", "max")), ODD, ODD
)
# What the kernels stream through registers; among arbitrary windows it would hardly ever come up.
STREAMED = st.sampled_from(
    [f"{kind}_pool_{k}x{k}" for kind in ("avg", "max") for k in (3, 5, 7)]
    + [f"max_pool_{k}x{k}" for k in (9, 11, 13, 15)]
)
# Triton's interpreter takes a tenth of a second for what others do in a millisecond, and three
# tenths for the second order.
SIDE = st.integers(1, 9) if INTERPRETED else st.integers(1, 40) | st.integers(1, 9)
SECOND_ORDER = settings(max_examples=-(-settings().max_examples // (5 if INTERPRETED else 1)))
STRIDES = (1, 1, 1, 2, 3, (1, 2), (4, 1), (9, 9))
FINITE = sorted(set(cases.DATA) - set(cases.NON_FINITE) - {"huge"})
ANY = sorted({*cases.DATA, *cases.PALETTES})


def _four(values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(values, values, values, values)


VIEWS = st.builds(
    View,
    order=st.permutations(range(4)).map(tuple),
    steps=_four(st.sampled_from((1, 1, 1, 2, 3, 0))),
    gaps=_four(st.sampled_from((0, 0, 1, 5))),
    offset=st.integers(0, 17),
)
LAYOUTS: st.SearchStrategy[Layout] = st.sampled_from(sorted(cases.LAYOUTS)) | VIEWS


@st.composite
def drawn_cases(draw: st.DrawFn, data: list[str], dtypes: tuple[torch.dtype, ...]) -> Case:
    """A small call with anything in it."""
    stride = draw(st.sampled_from(STRIDES))
    names = draw(st.sampled_from((POOLINGS, STREAMED))) | st.just("none")
    if stride == 1:
        names = names | st.just("skip_connect")
    candidates = tuple(draw(st.lists(names, min_size=1, max_size=3 if INTERPRETED else 8)))
    # Nothing but zeros has no gradient in plain PyTorch, where no weight is multiplied with them.
    forms = ("mix",) if set(candidates) == {"none"} else ("mix", "stack")
    size = draw(st.tuples(st.integers(0, 3), st.integers(1, 5 if INTERPRETED else 19), SIDE, SIDE))
    return Case(
        size=size,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(LAYOUTS),
        data=draw(st.sampled_from(data)),
        candidates=candidates,
        stride=stride,
        count_include_pad=draw(st.booleans()),
        normalize=draw(st.sampled_from(("softmax", None))),
        alpha=draw(st.sampled_from(sorted(cases.ALPHA_SHAPES))),
        alpha_dtype=draw(st.sampled_from((None, torch.float32))),
        grad_layout=draw(LAYOUTS),
        form=draw(st.sampled_from(forms)),
    )


@pytest.mark.every
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", BACKENDS)
@given(case=drawn_cases(FINITE, cases.DTYPES))
def test_forward_and_backward(name: str, case: Case) -> None:
    judge.judge(judge.fused(require(name)), case)


@pytest.mark.every
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", BACKENDS)
@given(case=drawn_cases(ANY, cases.DTYPES))
def test_any_data(name: str, case: Case) -> None:
    judge.judge(judge.fused(require(name)), case, ("grad_x",))


def _counts(case: Case) -> int:
    """Values of a channel, by which it is normalised."""
    rows, columns = case.stride if isinstance(case.stride, tuple) else (case.stride, case.stride)
    n, _, h, w = case.size
    return n * len(range(0, h, rows)) * len(range(0, w, columns))


@pytest.mark.every
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@given(
    case=drawn_cases(["normal", "relu6", "distinct", "nan", "nan_inf"], (torch.float32,)).filter(
        lambda case: _counts(case) > 8
    )
)
def test_normalised(name: str, case: Case) -> None:
    """By the moments of so many values that their variance does not vanish."""
    judge.judge(judge.fused(require(name)), replace(case, form="normalized"))


@pytest.mark.every
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", BACKENDS)
@SECOND_ORDER
@given(case=drawn_cases(["normal", "relu6", "equal", "distinct"], (torch.float64,)))
def test_second_order(name: str, case: Case) -> None:
    """The gradient of a gradient, for every argument, against plain PyTorch."""
    wanted = [_second_order(f, case) for f in (judge.fused(require(name)), _in_float64)]
    for got, right in zip(*wanted, strict=True):
        torch.testing.assert_close(got, right)


def _in_float64(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.definition(x, alpha.double(), case)


def _second_order(function: judge.Function, case: Case) -> list[Tensor]:
    x, alpha, grad_out = case.tensors()
    leaves = [tensor.detach().requires_grad_() for tensor in (x, alpha, grad_out)]
    rng = case.rng()
    out = function(leaves[0], leaves[1], case)
    first = torch.autograd.grad(
        out, leaves[:2], leaves[2], create_graph=True, materialize_grads=True
    )
    sums = [
        (grad * torch.randn(grad.shape, generator=rng, dtype=grad.dtype)).nan_to_num().sum()
        for grad in first
    ]
    total = torch.stack(sums).sum()
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name == "cpu"])
@given(case=drawn_cases(ANY, (torch.float64, torch.float32, torch.float16)))
def test_witnesses_agree(name: str, case: Case) -> None:
    """The CPU kernels, the same on arrays (to the bit), PyTorch in float64, NumPy in float64."""
    x, alpha, grad_out = case.tensors()
    wide = alpha.to(judge.accumulation(case.dtype))
    weights = torch.softmax(wide, -1) if case.normalize == "softmax" else wide
    raw = Case(**{**vars(case), "normalize": None, "alpha_dtype": None})
    ours = judge.run(judge.fused(require(name)), raw, x, weights, grad_out)
    for array, key in zip(_on_arrays(x, weights, grad_out, raw), judge.ALL, strict=False):
        np.testing.assert_array_equal(array, ours[key].numpy())

    full = weights.double().expand(*case.size[:2], len(case.candidates)).contiguous()
    wide_x, wide_grad = x.double(), grad_out.double()
    third = witness.forward_and_gradients(wide_x.numpy(), full.numpy(), wide_grad.numpy(), raw)
    right = judge.run(judge.truth, raw, wide_x, full, wide_grad)
    sizes = {"out": _largest(third[0]), "grad_x": _largest(third[1])}
    if case.form == "mix" and case.data not in (
        *cases.NON_FINITE,
        "huge",
        "ends",
        "everything",
    ):  # sums may overflow
        pixels = case.size[2] * case.size[3]
        sizes["grad_alpha"] = pixels * _largest(x.detach().numpy()) * _largest(grad_out.numpy())
    for key, array in zip(judge.ALL, third, strict=True):
        if key in sizes:
            expected = right[key].numpy()
            np.testing.assert_allclose(array, expected, rtol=1e-9, atol=1e-12 * sizes[key])


def _on_arrays(x: Tensor, weights: Tensor, grad_out: Tensor, case: Case) -> tuple[np.ndarray, ...]:  # type: ignore[type-arg]
    """The output and the gradients that there are, by the NumPy entry points."""
    arrays = (x.detach().numpy(), weights.detach().numpy())
    names, options = case.candidates, {**case.options}
    options.pop("normalize", None)
    if case.form == "stack":
        out = numpy_api.multi_pool(arrays[0], names, **options)
        return out, numpy_api.multi_pool_grad(grad_out.numpy(), arrays[0], names, **options)
    grads = numpy_api.meta_pool_grad(grad_out.numpy(), *arrays, names, **options)
    return numpy_api.meta_pool(*arrays, names, **options), *grads


def _largest(array: np.ndarray) -> float:  # type: ignore[type-arg]
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max()) if finite.size else 0.0
