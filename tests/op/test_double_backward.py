"""Derivatives of every order, backward and forward, by finite differences in float64."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from tests import cases, judge
from tests.cases import CANDIDATES, Case

SMALL = Case((2, 2, 3, 4), torch.float64, data="distinct", candidates=("max_pool_3x3",))


def _small_cases() -> Iterator[Case]:
    mixed = ("skip_connect", "max_pool_3x3", "avg_pool_3x3", "none")
    for layout in cases.NATIVE_LAYOUTS:
        base = replace(SMALL, layout=layout)
        for names in (("max_pool_3x3",), ("max_pool_1x3", "avg_pool_5x3"), mixed):
            yield replace(base, candidates=names)
            yield replace(base, candidates=names, normalize=None)
        for alpha in ("ck", "n1k", "nck"):
            yield replace(base, candidates=mixed, alpha=alpha)
        pools = ("max_pool_3x3", "avg_pool_3x5")
        yield replace(base, candidates=pools, stride=2)
        yield replace(base, candidates=pools, count_include_pad=False, normalize=None)
        yield replace(base, candidates=("avg_pool_7x7", "avg_pool_1x1"), count_include_pad=False)
        for names in (mixed, ("max_pool_3x5", "avg_pool_3x3", "max_pool_3x5")):
            yield replace(base, candidates=names, form="stack")
            yield replace(base, candidates=names, form="normalized")
        yield replace(base, candidates=pools, count_include_pad=False, stride=2, form="stack")
    yield replace(SMALL, layout="sliced", candidates=mixed)


SMALL_CASES = tuple(_small_cases())


def _leaves(case: Case) -> tuple[Tensor, Tensor]:
    x, alpha, _ = case.tensors()
    return x.requires_grad_(), alpha.requires_grad_()


@pytest.mark.many_calls
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_first_order(backend: str, case: Case) -> None:
    function = judge.fused(backend)
    assert gradcheck(
        lambda x, alpha: function(x, alpha, case),
        _leaves(case),
        check_forward_ad=True,
        check_batched_grad=True,
        # aten's own forward-mode derivative of max pooling has no batching rule
        check_batched_forward_grad=backend != "reference",
    )


@pytest.mark.many_calls
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_second_order(backend: str, case: Case) -> None:
    function = judge.fused(backend)
    assert gradgradcheck(
        lambda x, alpha: function(x, alpha, case),
        _leaves(case),
        # aten's own max pooling has no batching rule for channels_last before torch 2.14
        check_batched_grad=backend != "reference",
    )


@pytest.mark.many_calls
@pytest.mark.parametrize("case", SMALL_CASES[::3], ids=str)
def test_forward_over_reverse(backend: str, case: Case) -> None:
    function = judge.fused(backend)
    assert gradgradcheck(
        lambda x, alpha: function(x, alpha, case), _leaves(case), check_fwd_over_rev=True
    )


@pytest.mark.many_calls
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.normalize is None], ids=str)
def test_reverse_over_forward(backend: str, case: Case) -> None:
    """The forward-mode derivative is differentiable in turn; that of torch.softmax is not."""
    function = judge.fused(backend)
    x, alpha, _ = case.tensors()
    tangents = torch.randn_like(x), torch.randn_like(alpha)

    def directional(x: Tensor, alpha: Tensor) -> Tensor:
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, (x, alpha), tangents)
            return forward_ad.unpack_dual(function(*duals, case)).tangent

    assert gradcheck(directional, _leaves(case))


@pytest.mark.parametrize("case", SMALL_CASES[::3], ids=str)
def test_reverse_over_forward_in_the_direction_alone(backend: str, case: Case) -> None:
    """The derivative is linear in its direction: that has a gradient where x asks for none."""
    x, alpha, grad_out = case.tensors()
    direction = torch.randn_like(x).requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        tangent = forward_ad.unpack_dual(judge.fused(backend)(dual, alpha, case)).tangent
    (ours,) = torch.autograd.grad(tangent, direction, grad_out)
    right = judge.results(judge.definition, case, ("grad_x",), grad_out)["grad_x"]
    torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", SMALL_CASES[::4], ids=str)
def test_third_order_is_that_of_the_definition(backend: str, case: Case) -> None:
    def third(function: judge.Function) -> list[Tensor]:
        leaves = _leaves(case)
        value = function(*leaves, case).tanh().sum()
        for power in (2, 3):
            grads = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
            value = sum((grad**power).sum() for grad in grads)
        return list(torch.autograd.grad(value, leaves, materialize_grads=True))

    for ours, right in zip(third(judge.fused(backend)), third(judge.definition), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.normalize is None], ids=str)
def test_forward_over_second_order(backend: str, case: Case) -> None:
    """Of the second derivative, forward mode and backward mode give the same third one."""
    function = judge.fused(backend)
    directions, cotangents = ([torch.randn_like(t) for t in _leaves(case)] for _ in range(2))

    def second(*leaves: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*leaves, case).tanh().sum(), leaves, create_graph=True)
        value = first[0].pow(2).sum() + first[1].pow(3).sum()
        return torch.autograd.grad(value, leaves, create_graph=True)

    leaves = _leaves(case)
    third = torch.autograd.grad(second(*leaves), leaves, cotangents)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, _leaves(case), directions)
        tangents = [forward_ad.unpack_dual(grad).tangent for grad in second(*duals)]
    ours, right = (
        sum((a * b).sum() for a, b in zip(of, along, strict=True))
        for of, along in ((tangents, cotangents), (third, directions))
    )
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("needs", ["x", "alpha"])
@pytest.mark.parametrize("wants", ["x", "alpha"])
def test_one_second_derivative_alone(backend: str, wants: str, needs: str) -> None:
    """Only one first derivative is taken, and only one argument of it differentiated."""
    case = replace(SMALL, candidates=("max_pool_3x3", "avg_pool_3x3", "skip_connect"))

    def second(function: judge.Function) -> Tensor:
        x, alpha = _leaves(case)
        leaves = {"x": x, "alpha": alpha}
        out = function(x, alpha, case)
        (first,) = torch.autograd.grad(out.square().sum(), leaves[needs], create_graph=True)
        (grad,) = torch.autograd.grad(first.square().sum(), leaves[wants])
        return grad

    ours, right = second(judge.fused(backend)), second(judge.definition)
    torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_second_order_on_tied_data(backend: str, layout: str, dtype: torch.dtype) -> None:
    """What selects stays the first maximum at every order; ReLU6 makes planes of ties."""
    case = Case((2, 9, 7, 9), dtype, layout, "relu6", CANDIDATES["default"])

    def second(function: judge.Function, to: torch.dtype) -> tuple[Tensor, ...]:
        x, alpha, grad_out = (t.detach().to(to) for t in case.tensors())
        leaves = (x.requires_grad_(), alpha.requires_grad_(), grad_out.requires_grad_())
        out = function(x, alpha, case)
        grads = torch.autograd.grad(out, (x, alpha), grad_out, create_graph=True)
        seed = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(g.shape, generator=seed).to(dtype).to(to) for g in grads]
        return torch.autograd.grad(grads, leaves, cotangents)

    right = second(judge.definition, torch.float64)
    ours = second(judge.fused(backend), dtype)
    for got, want in zip(ours, right, strict=True):
        assert got.dtype is dtype
        scale = want.abs().max().item()
        error = (got.double() - want).abs().max().item()
        assert error <= 20 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(2, 3), lambda x: x[:1].expand_as(x), lambda x: x],
    ids=["transposed", "expanded", "itself"],
)
def test_cotangent_in_the_memory_of_x(backend: str, view: Callable[[Tensor], Tensor]) -> None:
    """Both begin at the same address, and a kernel may not take the one for the other."""
    case = Case((2, 3, 6, 6))
    x, alpha, grad_out = (tensor.requires_grad_() for tensor in case.tensors())

    def second(cotangent: Tensor) -> tuple[Tensor, ...]:
        out = judge.fused(backend)(x, alpha, case)
        (grad_x,) = torch.autograd.grad(out, x, grad_out, create_graph=True)
        return torch.autograd.grad(grad_x, (alpha, grad_out), cotangent)

    cotangent = view(x.detach())
    for got, right in zip(second(cotangent), second(cotangent.clone()), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.many_calls
def test_gradient_step_through_a_gradient_step(backend: str) -> None:
    """The unrolled step of a bilevel search: d loss(x - lr * d loss) / d alpha."""
    case = replace(SMALL, candidates=("max_pool_3x3", "avg_pool_3x3", "skip_connect"))
    x, alpha, target = case.tensors()

    def outer(alpha: Tensor, function: judge.Function) -> Tensor:
        inner_x = x.clone().requires_grad_()
        loss = (function(inner_x, alpha, case) - target).square().mean()
        (grad,) = torch.autograd.grad(loss, inner_x, create_graph=True)
        stepped = inner_x - 0.01 * grad
        return (function(stepped, alpha, case) - target).square().mean()

    alpha = alpha.requires_grad_()
    assert gradcheck(lambda alpha: outer(alpha, judge.fused(backend)), (alpha,))


def test_no_graph_without_need(backend: str) -> None:
    x, alpha = torch.randn(1, 2, 5, 5), torch.randn(7)
    assert not judge.op(x, alpha, backend=backend).requires_grad
    with torch.no_grad():
        out = judge.op(x.requires_grad_(), alpha, backend=backend)
    assert not out.requires_grad
    with torch.inference_mode():
        inside = judge.op(x, alpha, backend=backend)
    assert torch.equal(inside, out)
