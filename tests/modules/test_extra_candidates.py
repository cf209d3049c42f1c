"""Modules that are mixed beside the poolings: computed, reduced, copied, refused."""

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import DEFAULT_CANDIDATES, MetaPool2d, SpatialEnhancer
from tests.cases import CANDIDATES
from tests.modules.test_modules import COPIES, X


class Gate(nn.Module):
    """An extra candidate with weights: each channel times a number of its own, bounded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.scale[:, None, None].to(x.dtype)


EXTRA_OPTIONS = {
    "softmax": {},
    "per channel": {"channels": 6},
    "raw": {"normalize": None},
    "raw per channel": {"normalize": None, "channels": 6},
    "extras alone": {"candidates": ()},
    "no pad count": {"candidates": CANDIDATES["avg"], "count_include_pad": False},
}


def _with_extras(name: str, **more: object) -> MetaPool2d:
    torch.manual_seed(1)
    extras = {"gate": Gate(6), "blur": nn.AvgPool2d(3, 1, 1)}
    module = MetaPool2d(extra_candidates=extras, **EXTRA_OPTIONS[name], **more)  # type: ignore[arg-type]
    with torch.no_grad():
        module.alpha.normal_()
    return module


def _written_out(module: MetaPool2d, x: Tensor) -> Tensor:
    """The sum of all candidates in plain torch, each candidate's weight from :meth:`weights`."""
    total = torch.zeros_like(x)
    for k, name in enumerate(module.candidate_names):
        if module.extras is not None and name in module.extras:
            out = module.extras[name](x)
        else:
            plain = MetaPool2d([name], count_include_pad=module.count_include_pad).to_torch()
            out = plain(x)
        total = total + module.weights()[..., k, None, None] * out
    return total


@pytest.mark.parametrize("name", EXTRA_OPTIONS)
def test_extra_candidates_are_mixed_beside_the_poolings(backend: str, name: str) -> None:
    module = _with_extras(name, backend=backend)
    pools = module.candidates
    assert module.candidate_names == (*pools, "gate", "blur")
    assert module.alpha.shape[-1] == len(pools) + 2
    torch.testing.assert_close(module(X), _written_out(module, X), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module(X[0]), module(X)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.to_torch()(X), module(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXTRA_OPTIONS)
def test_gradients_pass_through_extra_candidates(backend: str, name: str) -> None:
    module = _with_extras(name, backend=backend).double()
    x = X.double().requires_grad_()
    wanted = [x, *module.parameters()]
    assert len(wanted) == 3
    weight = torch.randn(X.shape, dtype=torch.float64)
    got = torch.autograd.grad((module(x) * weight).sum(), wanted)
    expected = torch.autograd.grad((_written_out(module, x) * weight).sum(), wanted)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.many_calls
@pytest.mark.parametrize("extras", [None, {"gate": Gate(6)}], ids=["poolings", "extras"])
def test_another_alpha_can_take_the_place_of_the_parameter(
    backend: str, extras: dict[str, nn.Module] | None
) -> None:
    """As the search does it, which differentiates a second time."""
    names = ("max_pool_3x3", "avg_pool_3x3")
    module = MetaPool2d(names, extra_candidates=extras, backend=backend).double()
    module.alpha.requires_grad_(False)
    x = X[:1, :, :3, :3].double().requires_grad_()

    def call(alpha: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, {"alpha": alpha}, (x,))
        return out

    alpha = torch.randn_like(module.alpha).requires_grad_()
    module.alpha.copy_(alpha.detach())
    assert torch.equal(call(alpha, x), module(x))
    assert torch.autograd.gradgradcheck(call, (alpha, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_extra_candidates_keep_the_dtype_and_are_rounded_once(
    backend: str, dtype: torch.dtype
) -> None:
    module = _with_extras("extras alone", backend=backend)
    x = X.to(dtype)
    weights = module.weights().double()
    outs = [extra(x).double() for extra in module.extras.values()]  # type: ignore[union-attr]
    exact = weights[0] * outs[0] + weights[1] * outs[1]
    out = module(x)
    assert out.dtype is dtype
    rounded_once = 0.5001 * torch.finfo(dtype).eps * exact.abs() + 1e-7
    assert ((out.double() - exact).abs() <= rounded_once).all()
    assert _with_extras("softmax", backend=backend)(x).dtype is dtype


@pytest.mark.parametrize(
    "keep, pools, extras, order",
    [
        ([8, 5, 7, 0], (5, 0), ("blur", "gate"), [5, 0, 8, 7]),
        ([7], (), ("gate",), [7]),
        ([3], (3,), (), [3]),
    ],
    ids=["both", "extra alone", "pooling alone"],
)
@pytest.mark.parametrize("name", ["softmax", "raw per channel"])
def test_reduce_with_extra_candidates(
    backend: str,
    name: str,
    keep: list[int],
    pools: tuple[int, ...],
    extras: tuple[str, ...],
    order: list[int],
) -> None:
    module = _with_extras(name, backend=backend)
    reduced = module.reduce(keep)
    kept = tuple(DEFAULT_CANDIDATES[k] for k in pools)
    assert reduced.candidates == kept and reduced.candidate_names == kept + extras
    assert torch.equal(reduced.alpha, module.alpha[..., order])
    torch.testing.assert_close(reduced(X), _written_out(reduced, X), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reduced.to_torch()(X), reduced(X), rtol=1e-6, atol=1e-6)
    scale = module.extras["gate"].scale  # type: ignore[index]
    assert any(p is scale for p in reduced.parameters()) is ("gate" in extras)
    with pytest.raises(ValueError, match="positions from 0 to 8"):
        module.reduce([9])


def test_a_single_extra_candidate_becomes_itself() -> None:
    module = _with_extras("softmax").reduce([7])
    assert module.to_torch() is module.extras["gate"]  # type: ignore[index]
    enhancer = SpatialEnhancer(6, extra_candidates={"gate": Gate(6)})
    assert enhancer.pool.candidate_names[-1] == "gate"
    assert torch.equal(enhancer(X), nn.functional.hardswish(enhancer.norm(enhancer.pool(X))))
    enhancer.reduce([7])
    assert isinstance(enhancer.to_torch()[0], Gate)


@pytest.mark.parametrize("how", COPIES)
def test_copies_with_extra_candidates_compute_the_same(how: str) -> None:
    module = _with_extras("per channel")
    assert list(module.state_dict()) == ["alpha", "extras.gate.scale"]
    copied = COPIES[how](module)
    assert torch.equal(copied(X), module(X))
    ours = {p.data_ptr() for p in module.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in copied.parameters())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"extra_candidates": {"max_pool_3x3": nn.Identity()}}, ValueError, "not as a pooling"),
        ({"extra_candidates": {"a.b": nn.Identity()}}, ValueError, "letters, digits"),
        ({"extra_candidates": {"gate": torch.tanh}}, TypeError, "should be an nn.Module"),
        ({"extra_candidates": {"gate": nn.Identity()}, "stride": 2}, ValueError, "need stride 1"),
        ({"extra_candidates": {}, "candidates": ()}, ValueError, "candidates is empty"),
    ],
)
def test_extra_candidates_that_cannot_be(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    options = {"candidates": CANDIDATES["no_skip"], **arguments}
    with pytest.raises(error, match=message):
        MetaPool2d(**options)  # type: ignore[arg-type]


def test_an_extra_candidate_must_keep_the_shape() -> None:
    module = MetaPool2d(extra_candidates={"squeeze": nn.AdaptiveAvgPool2d(1)})
    with pytest.raises(RuntimeError, match=r"'squeeze' should give .* got \(2, 6, 1, 1\)"):
        module(X)
