"""First derivatives on every backend against the float64 truth."""

import pytest
import torch
from torch import Tensor

from tests import cases, judge
from tests.cases import CANDIDATES, Case

BOTH = ("grad_x", "grad_alpha")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", cases.GRID, ids=str)
def test_gradients_are_right(backend: str, case: Case) -> None:
    judge.judge(judge.fused(backend), case, BOTH)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", cases.DATA_GRID, ids=str)
def test_gradient_of_x_is_right_for_any_data(backend: str, case: Case) -> None:
    """It depends on x through the choice of the maxima alone, so it is finite for any x."""
    judge.judge(judge.fused(backend), case, ("grad_x",))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("wants", [("grad_x",), ("grad_alpha",), BOTH], ids=str)
@pytest.mark.parametrize("alpha", cases.ALPHA_SHAPES)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_only_what_is_needed(backend: str, layout: str, alpha: str, wants: tuple[str, ...]) -> None:
    judge.judge(judge.fused(backend), Case(layout=layout, alpha=alpha), wants)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", ["ck", "n1k", "nck"])
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("size", [(3, 37, 6, 5), (2, 3, 70, 5)], ids=["groups", "strips"])
def test_weights_of_planes_that_are_done_in_parts(
    backend: str, size: cases.Size, layout: str, alpha: str, dtype: torch.dtype
) -> None:
    """Planes in several groups of sixteen, some of two images, and planes cut into strips."""
    judge.judge(judge.fused(backend), Case(size, dtype, layout, alpha=alpha))


@pytest.mark.parametrize(
    ("size", "layout", "stride", "alpha"),
    [
        ((1, 2, 32, 256), "contiguous", 1, "k"),
        ((1, 2, 32, 256), "contiguous", 1, "nck"),
        ((1, 8192, 1, 2), "contiguous", 1, "k"),
        ((1, 32, 7, 7), "contiguous", 1, "ck"),
        ((1, 4, 32, 56), "channels_last", 1, "ck"),
        ((1, 16, 32, 56), "channels_last", (2, 1), "ck"),
        ((1, 1, 6, 700), "contiguous", 2, "ck"),
    ],
    ids=["few_planes", "each_plane", "many_planes", "small", "streamed", "strided", "wide"],
)
def test_equal_terms_do_not_drift(
    backend: str, size: cases.Size, layout: str, stride: int | tuple[int, int], alpha: str
) -> None:
    """Of a constant map all terms of the gradient of alpha are equal: added one after the other,
    they are rounded the same way again and again."""
    names = ("max_pool_3x3", "avg_pool_3x3")
    weights = torch.ones(cases.ALPHA_SHAPES[alpha](1, size[1], 2), requires_grad=True)
    options = {"normalize": None, "stride": stride, "count_include_pad": False}
    for pixel, gradient in ((0.7, 0.3), (0.1, 0.9), (1 / 3, 0.37), (0.23, 0.59)):
        x = cases.LAYOUTS[layout](torch.full(size, pixel))
        out = judge.op(x, weights, names, backend=backend, **options)
        grad_out = torch.full_like(out, gradient)
        (grad,) = torch.autograd.grad(out, weights, grad_out)
        each = x[..., : out.shape[2], : out.shape[3]].double() * grad_out.double()
        right = (each.sum() if alpha == "k" else each.sum((2, 3))[0, :, None]).expand_as(grad)
        torch.testing.assert_close(
            grad.double(), right, rtol=4 * torch.finfo(torch.float32).eps, atol=0
        )


def test_averages_of_equal_numbers_do_not_drift(backend: str) -> None:
    """Nine times 0.7 in one chain of additions is off by more than two rounding units."""
    alpha = torch.ones(1)
    grad_out = torch.tensor([1.6016982, 0.024383947, 1.6016982, 0.024383947])
    grad_out = torch.cat([grad_out, torch.tensor([0.3841343, 3.1474295, 0.3841343, 3.1474295])])
    grad_out = grad_out.view(2, 1, 2, 2)
    options = {"stride": 2, "count_include_pad": False, "normalize": None}
    case = Case((2, 1, 3, 3), candidates=("avg_pool_5x5",), **options)
    x = torch.full(case.size, 0.7)
    judge.verdict(
        judge.run(judge.fused(backend), case, x, alpha, grad_out), case, x, alpha, grad_out
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("other", ["max_pool_3x3", "avg_pool_3x3", "max_pool_1x3"])
def test_zeros_times_what_is_not_finite(backend: str, other: str, value: float) -> None:
    """The weight of "none" gets the incoming gradient times zero, as in eager PyTorch."""
    x, grad_out = torch.rand(2, 1, 6, 5), torch.ones(2, 1, 6, 5)
    grad_out[0, 0, 3, 4] = value
    alpha = torch.ones(2, 1, 2, requires_grad=True)
    out = judge.op(x, alpha, ("none", other), normalize=None, backend=backend)
    (grad,) = torch.autograd.grad(out, alpha, grad_out)
    assert grad[0, 0, 0].isnan() and grad[1, 0, 0] == 0


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_ties_go_to_the_first_maximum(backend: str, dtype: torch.dtype, layout: str) -> None:
    x = cases.LAYOUTS[layout](torch.zeros(2, 3, 3, 3, dtype=dtype))
    expected = torch.tensor([[4, 2, 0], [2, 1, 0], [0, 0, 0]], dtype=dtype)
    grad = _grad_of_sum(x, ("max_pool_3x3",), backend)
    assert torch.equal(grad, expected.expand_as(grad))


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_signed_zeros_are_ties(backend: str, layout: str) -> None:
    x = torch.tensor([[[[-0.0, 0.0, -0.0]]]]).expand(1, 5, 1, 3)
    grad = _grad_of_sum(cases.LAYOUTS[layout](x), ("max_pool_1x3",), backend)
    assert torch.equal(grad, torch.tensor([2.0, 1.0, 0.0]).expand_as(grad))


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_last_nan_takes_the_gradient(backend: str, dtype: torch.dtype, layout: str) -> None:
    row = [torch.nan, 9.0, torch.nan, torch.inf, 1.0, 2.0]
    x = torch.tensor(row, dtype=dtype).expand(1, 4, 1, 6)
    grad = _grad_of_sum(cases.LAYOUTS[layout](x), ("max_pool_1x5",), backend)
    expected = torch.tensor([0, 0, 5, 1, 0, 0], dtype=dtype)
    assert torch.equal(grad, expected.expand_as(grad))


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("names", ["max", "largest", "strips"])
@pytest.mark.parametrize("data", ["minus_inf", "minus_inf_block", "equal", "signed_zero"])
def test_windows_without_a_single_maximum(backend: str, data: str, names: str, layout: str) -> None:
    """All -Inf, all equal: the gradient is that of aten, and sums to what came in."""
    case = Case((2, 3, 9, 17), layout=layout, data=data, candidates=CANDIDATES[names])
    judge.judge(judge.fused(backend), case, ("grad_x",))


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("data", cases.NON_FINITE)
@pytest.mark.parametrize("name", ["max_pool_3x3", "max_pool_1x7", "skip_connect", "avg_pool_3x3"])
def test_gradient_of_weights_where_x_is_not_finite(
    backend: str, name: str, data: str, layout: str
) -> None:
    """NaN and infinities of <g, P(x)> are those of eager PyTorch, for g > 0.

    Elsewhere those of averages may differ: summed over inputs instead of outputs, an infinity meets
    the sum of the gradients of its windows and not each of them. Where that sum is zero, or the
    gradients themselves are infinite, an infinity may become NaN.
    """
    case = Case(
        (2, 3, 9, 17), layout=layout, data=data, candidates=(name, "none"), normalize=None,
        alpha="nck",
    )  # fmt: skip
    x, alpha, grad_out = case.tensors()
    grad_out = grad_out.abs() + 0.1
    got = judge.run(judge.fused(backend), case, x, alpha, grad_out, ("grad_alpha",))
    judge.verdict({"grad_alpha": got["grad_alpha"]}, case, x, alpha, grad_out)


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_what_no_window_chose_leaves_the_gradient_of_weights_finite(
    backend: str, layout: str
) -> None:
    """Masked maps: -Inf beside finite values is never a maximum, and 0 * -Inf is never formed."""
    x = torch.arange(60.0).view(1, 3, 4, 5)
    x[..., 1, 1] = -torch.inf
    alpha = torch.ones(1, requires_grad=True)
    out = judge.op(
        cases.LAYOUTS[layout](x), alpha, ("max_pool_3x3",), normalize=None, backend=backend
    )
    (grad,) = torch.autograd.grad(out.sum(), alpha)
    assert grad.isfinite().all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("grad_layout", [*cases.LAYOUTS, "one_value"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_any_layout_of_the_incoming_gradient(backend: str, layout: str, grad_layout: str) -> None:
    case = Case(layout=layout, candidates=CANDIDATES["unsorted"])
    x, alpha, drawn = case.tensors()
    if grad_layout == "one_value":
        grad_out = torch.ones(()).expand(drawn.shape)
    else:
        grad_out = cases.LAYOUTS[grad_layout](drawn)
    got = judge.run(judge.fused(backend), case, x, alpha, grad_out)
    judge.verdict(got, case, x, alpha, grad_out)


@pytest.mark.parametrize("width", [5, 7])
def test_weights_alone_of_maps_cut_out_of_wider_ones(backend: str, width: int) -> None:
    """Rows that begin where vectors may be read, and end within one: NaN lies behind."""
    case = Case((2, 3, 5, width))
    x, alpha, grad_out = case.tensors()
    cut = []
    for map in (x, grad_out):
        outer = map.new_full((*map.shape[:3], 8), torch.nan)
        cut.append(outer[..., :width].copy_(map))
    got = judge.run(judge.fused(backend), case, cut[0], alpha, cut[1], ("grad_alpha",))
    judge.verdict(got, case, cut[0], alpha, cut[1])


@pytest.mark.parametrize("alpha", cases.ALPHA_SHAPES)
def test_no_batch_gives_zero_gradients(backend: str, alpha: str) -> None:
    case = Case((0, 3, 5, 4), alpha=alpha)
    got = judge.results(judge.fused(backend), case)
    assert got["out"].shape == got["grad_x"].shape == (0, 3, 5, 4)
    assert torch.equal(got["grad_alpha"], torch.zeros_like(got["grad_alpha"]))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradients_accumulate_into_leaves(backend: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    x, alpha, grad_out = case.tensors()
    expected = judge.results(judge.fused(backend), case)
    for leaf in (x, alpha):
        leaf.requires_grad_()
    for _ in range(2):
        judge.fused(backend)(x, alpha, case).backward(grad_out)
    assert x.grad is not None and alpha.grad is not None
    assert torch.equal(x.grad, 2 * expected["grad_x"])
    assert torch.equal(alpha.grad, 2 * expected["grad_alpha"])


def _grad_of_sum(x: Tensor, candidates: tuple[str, ...], backend: str) -> Tensor:
    x = x.detach().requires_grad_()
    out = judge.op(x, torch.zeros(len(candidates)), candidates, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    return grad


@pytest.mark.parametrize("stride", [5, 7, 2**31 - 1, (1, 2**31 - 1)], ids=str)
def test_strides_beyond_the_map(backend: str, stride: int | tuple[int, int]) -> None:
    """Such a stride leaves one window, and must not cost memory or overflow."""
    names = ("max_pool_3x3", "avg_pool_5x5", "max_pool_7x7")
    judge.judge(judge.fused(backend), Case(size=(1, 2, 5, 5), candidates=names, stride=stride))


@pytest.mark.parametrize(
    "size, stride, at",
    [
        pytest.param((1, 1, 9, 9), (4, 4), (2, 2), id="between"),
        pytest.param((1, 2, 1, 6), (1, 3), (0, 5), id="last column"),
        pytest.param((1, 2, 17, 6), (1, 3), (3, 5), id="last column of a high map"),
        pytest.param((1, 1, 6, 5), (3, 1), (5, 2), id="last row"),
    ],
)
def test_nan_between_the_windows(
    backend: str, size: cases.Size, stride: tuple[int, int], at: tuple[int, int]
) -> None:
    """Pixels that no window sees have no part in any gradient."""
    x = torch.randn(size, dtype=torch.float64)
    x[..., at[0], at[1]] = torch.nan
    x.requires_grad_()
    alpha = torch.randn(2, dtype=torch.float64, requires_grad=True)
    names = ("avg_pool_3x3", "max_pool_3x3")
    judge.op(x, alpha, names, stride=stride, backend=backend).square().sum().backward()
    assert x.grad is not None and alpha.grad is not None
    assert x.grad.isfinite().all() and alpha.grad.isfinite().all()


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize(
    "size", [(1, 3, 4, 8), (1, 3, 4, 9), (1, 3, 17, 8), (1, 3, 17, 9), (1, 1, 4, 302)], ids=str
)
@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_weights_of_maxima_that_are_not_finite(
    backend: str, weight: float, size: cases.Size, layout: str
) -> None:
    """They reach the maxima of their pooling and nothing else."""
    names = ("max_pool_3x3", "max_pool_5x5")
    case = Case(size, layout=layout, candidates=names, normalize=None)
    x, _, grad_out = case.tensors()
    grad_out = grad_out.abs() + 0.1
    alpha = torch.tensor([weight, 1.0])
    got = judge.run(judge.fused(backend), case, x, alpha, grad_out)
    right = judge.run(judge.truth, case, x, alpha, grad_out)
    torch.testing.assert_close(got, right, equal_nan=True, check_dtype=False)
