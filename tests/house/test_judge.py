"""The judge itself: right results pass, wrong kernels fail for the reason they should."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool_kernels import DEFAULT_CANDIDATES
from tests import cases, judge
from tests.cases import Case

MAX3 = Case(candidates=("max_pool_3x3",), normalize=None)
TIED = replace(MAX3, data="relu6")
NAN = replace(MAX3, data="nan")
WRONG_VALUE = "error .* is above"


class _LastOfTies(torch.autograd.Function):
    """Max pooling 3x3 whose gradient goes to the last maximum."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        flipped, index = F.max_pool2d(x.flip(2, 3), 3, 1, 1, return_indices=True)
        ctx.save_for_backward(index)
        return flipped.flip(2, 3)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        grad = torch.zeros_like(grad_out).flatten(2)
        grad.scatter_add_(2, index.flatten(2), grad_out.flip(2, 3).flatten(2))
        return grad.view_as(grad_out).flip(2, 3)


def _last_of_ties(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return alpha[0] * _LastOfTies.apply(x)


def _without_nan(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.eager(x.nan_to_num(-torch.inf), alpha, case)


def _without_infinity(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.eager(x.clamp(-1e30, 1e30), alpha, case)


def _shifted_halo(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    """The last column of the window is read one pixel too far, on the last row alone."""
    moved = torch.cat((x[..., 1:], x[..., -1:]), -1)
    right = judge.eager(x, alpha, case)
    return torch.cat((right[..., :-1, :], judge.eager(moved, alpha, case)[..., -1:, :]), -2)


def _zero_padded_max(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return alpha[0] * F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)


def _swapped_weights(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.eager(x, alpha.flip(-1), case)


def _unwritten_element(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    hole = torch.zeros(judge.eager(x, alpha, case).shape)
    hole.view(-1)[-1] = torch.nan
    return judge.eager(x, alpha, case) + hole


def _wrong_divisor(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.eager(x, alpha, replace(case, count_include_pad=not case.count_include_pad))


def _one_part_in_a_million(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.eager(x, alpha, case) * (1 + 2e-6)


def _rounded_at_every_step(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    """bfloat16 weights, products and sums, and the result rounded once more than needed."""
    return judge.eager(x, alpha, case) * (1 + 2**-7)


def _contiguous(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.eager(x, alpha, case).contiguous()


def _widened(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.eager(x.float(), alpha.float(), case)


def _cropped(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    return judge.eager(x, alpha, case)[..., :-1]


def _changes_x(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    out = judge.eager(x, alpha, case)
    x.detach().view(-1)[0] += 1
    return out


WRONG = [
    (_last_of_ties, TIED, ("grad_x",), f"grad_x: {WRONG_VALUE}"),
    (_without_nan, NAN, ("out",), "out: NaN differs"),
    (_without_infinity, replace(MAX3, data="inf"), ("out",), "out: .Inf differs"),
    (_without_infinity, replace(MAX3, data="minus_inf"), ("out",), "out: .Inf differs"),
    (_shifted_halo, MAX3, ("out",), f"out: {WRONG_VALUE}"),
    (_shifted_halo, Case(), ("out",), f"out: {WRONG_VALUE}"),
    (_shifted_halo, Case(), ("grad_x",), f"(out|grad_x): {WRONG_VALUE}"),
    (_zero_padded_max, MAX3, ("out",), f"out: {WRONG_VALUE}"),
    (_swapped_weights, Case(), ("out",), f"out: {WRONG_VALUE}"),
    (_swapped_weights, Case(dtype=torch.bfloat16), ("out",), f"out: {WRONG_VALUE}"),
    (_unwritten_element, Case(), ("out",), "out: NaN differs"),
    (_wrong_divisor, Case(), ("out",), f"out: {WRONG_VALUE}"),
    (_wrong_divisor, Case(dtype=torch.float16), ("out",), f"out: {WRONG_VALUE}"),
    (_one_part_in_a_million, Case(), ("out",), f"out: {WRONG_VALUE}"),
    (_rounded_at_every_step, Case(dtype=torch.bfloat16), ("out",), f"out: {WRONG_VALUE}"),
    (_contiguous, Case(layout="channels_last"), ("out",), "strides of out"),
    (_widened, Case(dtype=torch.float16), ("out",), "out has dtype torch.float32"),
    (_cropped, Case(), ("out",), "strides of out|out has shape"),
    (_changes_x, Case(), ("out",), "an input was changed"),
]


@pytest.mark.parametrize("function, case, wants, reason", WRONG)
def test_a_wrong_kernel_fails(function, case, wants, reason) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match=reason):
        judge.judge(function, case, wants)


WRONG_GRADIENTS = {
    "swapped weights": ("grad_alpha", lambda grad: grad.flip(-1)),
    "unwritten element": ("grad_x", lambda grad: grad.index_fill(3, torch.tensor(0), torch.nan)),
    "a lost window": ("grad_x", lambda grad: grad.index_fill(2, torch.tensor(10), 0.0)),
    "shifted": ("grad_x", lambda grad: grad.roll(1, 3)),
    "dropped planes": ("grad_alpha", lambda grad: grad * 0.9),
    "wrong shape": ("grad_alpha", lambda grad: grad[None]),
}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("fault", WRONG_GRADIENTS)
def test_a_wrong_gradient_fails(fault: str, dtype: torch.dtype) -> None:
    name, spoil = WRONG_GRADIENTS[fault]
    case = Case(dtype=dtype)
    x, alpha, grad_out = case.tensors()
    results = judge.run(judge.fused("reference"), case, x, alpha, grad_out)
    judge.verdict(results, case, x, alpha, grad_out)
    results[name] = spoil(results[name])
    with pytest.raises(AssertionError, match=name):
        judge.verdict(results, case, x, alpha, grad_out)


@pytest.mark.parametrize("name", judge.ALL)
@pytest.mark.parametrize("candidates", [("avg_pool_3x3",), DEFAULT_CANDIDATES], ids=len)
def test_forty_units_are_too_many_in_float64(candidates: tuple[str, ...], name: str) -> None:
    """The allowance follows from the windows of the case, not from the largest there may be."""
    case = Case(dtype=torch.float64, candidates=candidates, normalize=None)
    x, alpha, grad_out = case.tensors()
    results = judge.run(judge.truth, case, x, alpha, grad_out)
    size = judge.magnitudes(case, x, alpha, grad_out, (name,))[name]
    unit = torch.finfo(torch.float64).eps * size
    results[name].view(-1)[0] += 2 * unit
    judge.verdict(results, case, x, alpha, grad_out)
    results[name].view(-1)[0] += 38 * unit
    with pytest.raises(AssertionError, match=f"{name}: {WRONG_VALUE}"):
        judge.verdict(results, case, x, alpha, grad_out)


@pytest.mark.parametrize("seed", range(20))
def test_the_truth_is_not_exact_either(seed: int) -> None:
    """In float64 it is a sum like any other: what lies nearer to the exact one is right, on
    whichever side."""
    names = ("skip_connect",)
    case = Case((1, 11, 7, 1), torch.float64, data="equal", candidates=names, normalize=None)
    x, alpha, _ = case.tensors()
    column = torch.rand(11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grad_out = column[:, None, None].expand(case.size)
    pairs = zip(x.flatten().tolist(), grad_out.flatten().tolist(), strict=True)
    exact = sum(Fraction(a) * Fraction(b) for a, b in pairs)
    results = judge.run(judge.truth, case, x, alpha, grad_out)
    error = Fraction(results["grad_alpha"].item()) - exact
    results["grad_alpha"].fill_(float(exact - error / 2))
    judge.verdict(results, case, x, alpha, grad_out)


def test_eager_pytorch_passes_its_own_judge() -> None:
    for candidates in (DEFAULT_CANDIDATES, cases.CANDIDATES["strips"]):
        judge.judge(judge.eager, Case(candidates=candidates), ("out",))


def test_half_way_between_two_numbers_both_are_right(backend: str) -> None:
    """Where the truth of a gradient lies there, the last bit of a sum in float32 decides."""
    names = ("max_pool_5x5", "max_pool_5x7")
    case = Case((1, 1, 2, 2), torch.float16, data="equal", candidates=names)
    x, alpha, grad_out = case.tensors()
    grad_out = torch.tensor([[[[1, 2**-11], [0, 0]]]], dtype=torch.float16)
    results = judge.run(judge.fused(backend), case, x, alpha, grad_out)
    judge.verdict(results, case, x, alpha, grad_out)
    for value in (1, 1 + 2**-10):
        results["grad_x"][0, 0, 0, 0] = value
        judge.verdict(results, case, x, alpha, grad_out)
    results["grad_x"][0, 0, 0, 0] = 1 + 2**-9
    with pytest.raises(AssertionError, match=f"grad_x: {WRONG_VALUE}"):
        judge.verdict(results, case, x, alpha, grad_out)


def test_truth_does_not_depend_on_the_layout() -> None:
    """Also for the choice among ties, which is the definition's in row-major order."""
    grads = []
    for layout in cases.NATIVE_LAYOUTS:
        x = cases.LAYOUTS[layout](torch.zeros(1, 4, 5, 5))
        grad_out = torch.ones_like(x)
        got = judge.run(judge.truth, TIED, x, torch.ones(1), grad_out, ("grad_x",))
        grads.append(got["grad_x"])
    assert torch.equal(*grads)


def test_cases_are_what_they_say() -> None:
    assert len({str(case) for case in cases.GRID}) == len(cases.GRID)
    for layout in cases.LAYOUTS:
        x, _, _ = Case(layout=layout).tensors()
        assert x.shape == Case().size and x.isfinite().all()
        assert x.is_contiguous() == (layout in ("contiguous", "offset"))
    for data in cases.DATA:
        for dtype in cases.DTYPES:
            x, _, _ = Case(data=data, dtype=dtype).tensors()
            assert x.isfinite().all() == (data not in cases.NON_FINITE)
    x, _, _ = Case(data="signed_zero").tensors()
    assert (x == 0).all() and len(judge.bits(x).unique()) == 2
    x, _, _ = Case(data="relu6").tensors()
    assert (x == 0).double().mean() > 0.5


def test_same_case_same_tensors() -> None:
    first, second = Case(alpha="nck").tensors(), Case(alpha="nck").tensors()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("poisoned")
def test_poison_reaches_outputs() -> None:
    assert torch.ops.aten.empty.memory_format([3], dtype=torch.float32).isnan().all()
