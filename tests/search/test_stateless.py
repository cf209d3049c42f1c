"""Tensors that are put into a network count wherever it uses them, also when it runs again."""

import gc
import weakref
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels.search.method.bilevel import hypergradient
from metapool_kernels.search.networks.surgery import add_enhancers
from metapool_kernels.search.settings.config import Method
from metapool_kernels.search.training.objective import network_objective
from metapool_kernels.search.training.stateless import Stateless
from tests.search.losses import loss_of
from tests.search.networks import FOLLOWED, Small

METHODS: tuple[Method, ...] = get_args(Method)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*Lazy")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """So that nothing is noise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(how: str) -> nn.Module:
    torch.manual_seed(0)
    network = FOLLOWED[how](4, 1)
    add_enhancers(network, torch.zeros(1, 1, 8, 8), "mid")
    return network.train()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 1, 8, 8, generator=drawn)
    return images, torch.randint(0, 4, (16,), generator=drawn)


@pytest.mark.parametrize("how", FOLLOWED)
def test_the_gradient_is_that_of_the_same_tensors_loaded(how: str) -> None:
    network = make(how)
    named = dict(network.named_parameters())
    others = [(1.1 * p.detach() + 0.01).requires_grad_() for p in named.values()]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    noted = {name: id(value) for name, value in vars(network).items()}
    objective = network_objective(network, list(named), [])
    loss, _ = objective(others, [], loss_of(batch()))
    got = torch.autograd.grad(loss, others)
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    assert noted == {name: id(value) for name, value in vars(network).items()}

    with torch.no_grad():
        for own, other in zip(named.values(), others, strict=True):
            own.copy_(other)
    nn.functional.cross_entropy(network(batch()[0]), batch()[1]).backward()
    for (name, own), gradient in zip(named.items(), got, strict=True):
        assert own.grad is not None, name
        torch.testing.assert_close(gradient, own.grad, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["stem recomputed", "all recomputed"])
def test_recomputation_changes_no_hypergradient(how: str, method: Method) -> None:
    found = []
    for network in (make("ordinary"), make(how)):
        named = dict(network.named_parameters())
        (alpha,) = [name for name in named if name.endswith("alpha")]
        named[alpha].requires_grad_(False)
        weights = [name for name in named if name != alpha]
        found.append(
            hypergradient(
                network_objective(network, weights, [alpha]),
                [named[name] for name in weights],
                [named[alpha]],
                loss_of(batch(1)),
                loss_of(batch(2)),
                method=method,
                xi=1.0,
                tasks=(0, 3),
                tilt=1.4,
            ).gradients[0]
        )
    assert found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[1], found[0])


def test_buffers_and_what_is_noted_go_into_the_copy() -> None:
    network = make("containers, methods, hooks")
    shift = network.shift
    put = {id(buffer): buffer.clone() for buffer in network.buffers()}
    copy = Stateless(network).with_tensors(put)
    copy(batch()[0])
    assert network.shift is shift and copy.shift is not shift
    own, others = (dict(one.named_buffers()) for one in (network, copy))
    assert own.keys() == others.keys()
    assert any(not torch.equal(own[name], others[name]) for name in own)
    assert all(a is b for a, b in zip(network.parameters(), copy.parameters(), strict=True))


def test_a_copy_follows_the_mode_that_the_network_has_then() -> None:
    network = make("ordinary")
    stateless = Stateless(network)
    network.eval()
    copy = stateless.with_tensors({})
    assert not any(module.training for module in copy.modules())
    assert type(copy) is Small and copy is not network


@pytest.mark.parametrize("how", FOLLOWED)
def test_copies_and_their_tensors_are_freed(how: str) -> None:
    network = make(how)
    named = list(network.parameters())
    put = {id(p): p.detach().clone() for p in named}
    kept = [weakref.ref(tensor) for tensor in put.values()]
    Stateless(network).with_tensors(put)(batch()[0])
    put.clear()
    gc.collect()
    assert not any(ref() is not None for ref in kept)
