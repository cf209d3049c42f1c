"""The output on every backend against the float64 truth."""

from dataclasses import replace

import pytest
import torch

from tests import cases, judge
from tests.cases import Case

OUT = ("out",)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", cases.GRID, ids=str)
def test_output_is_right(backend: str, case: Case) -> None:
    judge.judge(judge.fused(backend), case, OUT)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", cases.DATA_GRID, ids=str)
def test_output_is_right_for_any_data(backend: str, case: Case) -> None:
    judge.judge(judge.fused(backend), case, OUT)


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("names", ["max", "ones", "only_skip"])
def test_maximum_and_skip_are_exact(backend: str, names: str, layout: str) -> None:
    """One candidate of weight 1 returns elements of x themselves."""
    for name in cases.CANDIDATES[names]:
        for dtype in cases.DTYPES:
            case = Case(dtype=dtype, layout=layout, candidates=(name,), normalize=None)
            x, alpha, _ = case.tensors()
            ones = torch.ones_like(alpha)
            assert torch.equal(judge.fused(backend)(x, ones, case), judge.eager(x, ones, case))


def test_zero_weight_on_a_nan_branch_is_nan(backend: str) -> None:
    x = torch.full((1, 1, 3, 3), torch.nan)
    alpha = torch.tensor([1.0, 0.0])
    candidates = ("none", "max_pool_3x3")
    out = judge.op(x, alpha, candidates, normalize=None, backend=backend)
    assert out.isnan().all()


def test_none_does_not_look_at_x(backend: str) -> None:
    x = torch.full((1, 2, 3, 3), torch.nan)
    out = judge.op(x, torch.ones(1), ("none",), backend=backend)
    assert torch.equal(out, torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize("names", ["with_none", "only_none"])
@pytest.mark.parametrize("stride", [(1, 2), (3, 1)], ids=str)
def test_none_steps_as_the_others_do(backend: str, stride: tuple[int, int], names: str) -> None:
    case = Case(candidates=cases.CANDIDATES[names], stride=stride, normalize=None)
    judge.judge(judge.fused(backend), case)


@pytest.mark.parametrize("other", ["avg_pool_3x3", "max_pool_3x3", "max_pool_1x3"])
def test_nothing_times_a_weight_that_is_not_finite(backend: str, other: str) -> None:
    """Zero times NaN is NaN, as in eager PyTorch."""
    x, weights = torch.rand(2, 1, 4, 5), torch.tensor([[[torch.nan, 1.0]], [[1.0, 1.0]]])
    out = judge.op(x, weights, ("none", other), normalize=None, backend=backend)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_infinities_of_both_signs_average_to_nan(backend: str) -> None:
    x = torch.tensor([[[[torch.inf, 0.0, 0.0, -torch.inf]]]])
    out = judge.op(x, torch.ones(1), ("avg_pool_1x3",), backend=backend)
    assert out.flatten().tolist() == [torch.inf, torch.inf, -torch.inf, -torch.inf]
    out = judge.op(x, torch.ones(1), ("avg_pool_1x7",), backend=backend)
    assert out.isnan().all()


def test_one_nan_does_not_leave_its_windows(backend: str) -> None:
    x = torch.zeros(1, 2, 9, 40)
    x[0, 0, 4, 20] = torch.nan
    candidates = cases.CANDIDATES["default"]
    bad = judge.op(x, torch.zeros(7), candidates, backend=backend).isnan()
    expected = torch.zeros_like(bad)
    expected[0, 0, 1:8, 17:24] = True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted"])
@pytest.mark.parametrize("alpha", ["k", "ck", "n1k", "nck"])
def test_three_dimensions_are_one_sample(backend: str, layout: str, alpha: str) -> None:
    case = Case((1, 5, 6, 7), layout=layout, alpha=alpha)
    x, weights, _ = case.tensors()
    whole = judge.fused(backend)(x, weights, case)
    single = judge.fused(backend)(x[0], weights, case)
    assert single.shape == (5, 6, 7)
    assert torch.equal(single, whole[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """Nearly every element is the value of the dtype that is nearest to the truth."""
    case = replace(Case(), dtype=dtype, alpha_dtype=torch.float32)
    x, alpha, _ = case.tensors()
    nearest = judge.truth(x, alpha, case).to(dtype)
    equal = judge.fused(backend)(x, alpha, case) == nearest
    assert equal.double().mean() > 0.99


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rounded_to_even(backend: str, dtype: torch.dtype, layout: str) -> None:
    """No error tells: what is half a unit off is as near to the one neighbour as to the other."""
    halves = 1 + torch.arange(18) * torch.finfo(dtype).eps / 2
    weights = torch.cat([halves, -halves])
    x = cases.LAYOUTS[layout](torch.ones(1, 36, 3, 19, dtype=dtype))
    names = ("skip_connect",)
    out = judge.op(x, weights[:, None], names, normalize=None, backend=backend)
    assert torch.equal(out, weights.to(dtype)[:, None, None].expand_as(x))
