"""What PyTorch does with modules: files, the meta device, parametrizations, second derivatives."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.nn.utils import parametrize

from metapool_kernels import MetaPool2d, SpatialEnhancer, fused_meta_pool
from tests import judge
from tests.cases import Case

X = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))


class Temperature(nn.Module):
    """alpha divided by a temperature."""

    def forward(self, alpha: Tensor) -> Tensor:
        return alpha / 0.5

    def right_inverse(self, alpha: Tensor) -> Tensor:
        return alpha * 0.5


class OnTheSimplex(nn.Module):
    """Squares that sum to one: weights without a softmax."""

    def forward(self, alpha: Tensor) -> Tensor:
        return alpha.square() / alpha.square().sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("projection", "normalize"), [(Temperature(), "softmax"), (OnTheSimplex(), None)]
)
def test_a_parametrized_alpha_trains_and_stays(
    backend: str, projection: nn.Module, normalize: str | None
) -> None:
    torch.manual_seed(0)
    module = MetaPool2d(channels=3, normalize=normalize, backend=backend)
    nn.init.normal_(module.alpha)  # squares of what is nearly zero would have huge gradients
    parametrize.register_parametrization(module, "alpha", projection)
    original = module.parametrizations.alpha.original
    expected = fused_meta_pool(X, projection(original), normalize=normalize, backend=backend)
    torch.testing.assert_close(module(X), expected)
    before, loss = original.detach().clone(), module(X).square().mean()
    loss.backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert not torch.equal(original, before) and module(X).square().mean() < loss
    final = module.alpha.detach().clone()
    parametrize.remove_parametrizations(module, "alpha")
    assert isinstance(module.alpha, nn.Parameter) and torch.equal(module.alpha, final)
    assert list(module.state_dict()) == ["alpha"]


def test_a_module_begun_on_the_meta_device(backend: str) -> None:
    """Made without memory, then given some, then its weights."""
    source = SpatialEnhancer(3, per_channel=True, backend=backend).eval()
    module = SpatialEnhancer(3, per_channel=True, backend=backend, device="meta").eval()
    out = module(torch.empty_like(X, device="meta"))
    assert out.is_meta and out.shape == X.shape and out.stride() == source(X).stride()
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(module(X), source(X))
    assigned = SpatialEnhancer(3, per_channel=True, backend=backend, device="meta").eval()
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(assigned(X), source(X))


def test_a_whole_module_is_saved_and_loaded_by_those_who_allow_its_classes(tmp_path: Path) -> None:
    module, path = SpatialEnhancer(3).eval(), tmp_path / "module.pt"
    torch.save(module, path)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    classes = [SpatialEnhancer, MetaPool2d, nn.BatchNorm2d, nn.Hardswish, set]
    with torch.serialization.safe_globals(classes):
        loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded(X), module(X))


def test_a_copy_of_what_has_a_history_is_refused_as_for_any_tensor() -> None:
    module = MetaPool2d()
    out = module(X)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(out)
    out.sum().backward()
    assert torch.equal(copy.deepcopy(module).alpha, module.alpha)
    file = io.BytesIO()
    torch.save(out.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), out)


SMALL = Case((1, 2, 3, 3), torch.float64, data="distinct", candidates=("max_pool_3x3", "none"))


def _loss(function: judge.Function, x: Tensor, alpha: Tensor) -> Tensor:
    return function(x, alpha, SMALL).tanh().square().sum()


@pytest.mark.parametrize(
    "compose",
    [
        lambda loss: hessian(loss, argnums=(0, 1)),
        lambda loss: jacrev(jacfwd(loss, argnums=(0, 1)), argnums=(0, 1)),
        lambda loss: jacfwd(jacrev(loss, argnums=(0, 1)), argnums=(0, 1)),
        lambda loss: jacrev(jacrev(loss, argnums=(0, 1)), argnums=(0, 1)),
        lambda loss: lambda x, a: vmap(hessian(loss, 1), (None, 0))(x, torch.stack([a, -a])),
        lambda loss: lambda x, a: vmap(hessian(loss), (0, None))(torch.stack([x, x.cos()]), a),
        lambda loss: lambda x, a: vmap(jacrev(grad(loss)), (0, 0))(
            torch.stack([x, x.cos()]), torch.stack([a, -a])
        ),
    ],
    ids=[
        "hessian of both", "reverse over forward", "forward over reverse", "reverse over reverse",
        "vmap of hessian of alpha", "vmap of hessian of x", "vmap of jacrev of grad",
    ],
)  # fmt: skip
def test_second_derivatives_in_every_order_of_transforms(backend: str, compose) -> None:  # type: ignore[no-untyped-def]
    x, alpha, _ = SMALL.tensors()
    got, right = (
        compose(lambda x, alpha, f=function: _loss(f, x, alpha))(x, alpha)
        for function in (judge.fused(backend), judge.definition)
    )
    torch.testing.assert_close(got, right)
