"""The plain torch.nn forms: the same numbers, whatever form is asked for."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import MetaPool2d, SpatialEnhancer
from metapool_kernels.candidates import parse_candidate
from metapool_kernels.convertible import to_plain
from metapool_kernels.plain import FORM, Form, ScaleShift, WeightedSum, freeze_norms, plain_pool

FORMS = {
    "default": FORM,
    "whole": Form(split_max=None, split_avg=None, pad_outside=False),
    "all split": Form(split_max=1, split_avg=1),
    "split, counting inside": Form(split_max=1, split_avg=1, pad_outside=False),
}
NAMES = ("max_pool_3x3", "max_pool_15x15", "max_pool_3x7", "avg_pool_5x5", "avg_pool_1x7")
STRIDES = ((1, 1), (2, 2), (2, 1), (3, 2))


def _map(*, ties: bool = False) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 10, dtype=torch.float64)
    return x.round() if ties else x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("name", [*NAMES, "avg_pool_15x15", "avg_pool_7x3"])
def test_every_form_computes_what_the_op_does(
    name: str, counted: bool, stride: tuple[int, int], form: str
) -> None:
    pool = MetaPool2d([name], stride=stride, count_include_pad=counted)
    plain = plain_pool(parse_candidate(name), stride, counted, FORMS[form])
    x = _map()
    torch.testing.assert_close(plain(x), pool(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("max")])
@pytest.mark.parametrize("stride", STRIDES)
def test_maxima_in_strips_are_the_same_bits_and_so_is_their_gradient(
    name: str, stride: tuple[int, int]
) -> None:
    """With ties, infinities and NaN: the first of equals in the order of rows is met first."""
    whole, split = (
        plain_pool(parse_candidate(name), stride, True, FORMS[form])
        for form in ("whole", "all split")
    )
    for value in (0.0, float("nan"), float("-inf"), float("inf")):
        x = _map(ties=True)
        x[0, 0, 4, 5] = x[1, 2, 0, 0] = value
        found = []
        for pool in (whole, split):
            leaf = x.clone().requires_grad_()
            out = pool(leaf)
            (gradient,) = torch.autograd.grad(out, leaf, torch.arange(out.numel()).view_as(out))
            found.append((out.detach(), gradient))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.nan_to_num(1e9), other.nan_to_num(1e9))


def test_wide_windows_are_strips_and_narrow_ones_are_not() -> None:
    def sizes(name: str, form: Form) -> list[object]:
        plain = plain_pool(parse_candidate(name), (1, 1), False, form)
        return [m.kernel_size for m in plain.modules() if hasattr(m, "kernel_size")]

    assert sizes("max_pool_7x7", FORM) == [(1, 7), (7, 1)]
    assert sizes("max_pool_7x7", Form(split_max=50)) == [(7, 7)]
    assert sizes("max_pool_7x7", Form(split_max=49)) == [(1, 7), (7, 1)]
    assert sizes("avg_pool_7x7", Form(split_max=1, split_avg=None)) == [(7, 7)]
    for name in ("max_pool_1x15", "avg_pool_15x1"):
        assert len(sizes(name, Form(split_max=1, split_avg=1))) == 1


def test_counted_padding_lies_outside_of_the_average() -> None:
    """What counts it inside, the delegates of ExecuTorch leave to slow kernels."""
    plain = plain_pool(parse_candidate("avg_pool_7x7"), (2, 2), True)
    for module in plain.modules():
        assert not isinstance(module, nn.AvgPool2d) or module.padding == 0
    kept = plain_pool(parse_candidate("avg_pool_7x7"), (2, 2), False)
    assert not any(isinstance(module, nn.ZeroPad2d) for module in kept.modules())


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_a_mixture_is_a_chain_of_additions(channels: int | None) -> None:
    pool = MetaPool2d(("max_pool_3x3", "none", "skip_connect", "avg_pool_3x3"), channels)
    pool.alpha.data.normal_()
    plain = pool.to_torch()
    assert isinstance(plain, WeightedSum)
    assert torch.equal(plain.weights, pool.weights().detach()[..., [0, 2, 3]])
    assert len(plain.pools) == 3, "zeros are added"
    x = _map()[:, : channels or 3].float()
    torch.testing.assert_close(plain(x), pool(x), rtol=1e-6, atol=1e-6)
    graph = torch.export.export(plain, (x,)).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "stack" in name or "sum" in name or "select" in name]
    nothing = MetaPool2d(("none",), normalize=None).to_torch()
    assert torch.equal(nothing(x), torch.zeros_like(x))


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_behind_a_pooling_is_one_scale_and_shift(affine: bool) -> None:
    torch.manual_seed(0)
    enhancer = SpatialEnhancer(3, ("max_pool_3x3",))
    enhancer.norm = nn.BatchNorm2d(3, affine=affine, eps=0.3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), enhancer)
    for parameter in model.parameters():
        parameter.data.normal_()
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6))
    model.eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    plain = to_plain(model)
    freeze_norms(plain)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
    kinds = [type(module) for module in plain.modules()]
    assert kinds.count(ScaleShift) == 1
    assert kinds.count(nn.BatchNorm2d) == 1, "the one behind a convolution, which takes it in"


def test_candidates_that_hold_poolings_become_plain_too() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), SpatialEnhancer(3), MetaPool2d())
    enhancer = SpatialEnhancer(3, ("max_pool_3x3",), extra_candidates={"inner": inner})
    model = nn.Sequential(nn.Conv2d(3, 3, 1), enhancer).eval()
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    for plain in (to_plain(copy.deepcopy(enhancer)), to_plain(model)):
        assert not any(isinstance(module, MetaPool2d) for module in plain.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class NormAndAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def hooked() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3)
    norm.register_forward_hook(lambda module, args, out: out + 1)
    return norm


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm2d(3, track_running_stats=False), lambda: NormAndAct(3), hooked]
)
def test_norms_that_do_something_else_stay(make: Callable[[], nn.Module]) -> None:
    """Of the batch itself, with an activation, with a hook."""
    model = nn.Sequential(nn.MaxPool2d(3), make()).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    freeze_norms(model)
    assert torch.equal(model(x), expected)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_forms_are_told_apart() -> None:
    """Networks are traced once for each form: equal ones have to be equal."""
    assert Form() == FORM
    assert all(one != other for one, other in itertools.combinations(FORMS.values(), 2))
