"""Each step of the two levels moves one group of parameters and nothing else."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from metapool_kernels.search.backbone import Backbone
from metapool_kernels.search.bilevel import alpha_step, weight_step
from metapool_kernels.search.config import AlphaConfig, ModelConfig, WeightConfig
from metapool_kernels.search.optimizers import forget, make_alpha_optimizer, make_weight_optimizer
from metapool_kernels.search.supernet import Supernet

ARGUMENTS = {"num_classes": 10, "in_chans": 1, "output_stride": 4}


@pytest.fixture
def supernet() -> Supernet:
    backbone = Backbone("mobilenetv2_035", ARGUMENTS, False, (1, 16, 16))
    net = Supernet(backbone, ModelConfig(), seed=0)
    net.model.train()
    return net


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 1, 16, 16), torch.arange(8)


def snapshot(net: Supernet) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.model.state_dict().items()}


def changed(before: Mapping[str, Tensor], net: Supernet) -> set[str]:
    return {n for n, value in net.model.state_dict().items() if not torch.equal(value, before[n])}


def names(net: Supernet) -> list[str]:
    return [site.name for site in net.sites]


def alpha_names(net: Supernet) -> set[str]:
    return {f"{name}.enhancer.pool.alpha" for name in names(net)}


def test_the_alpha_step_moves_alpha_alone(supernet: Supernet, batch: tuple[Tensor, Tensor]) -> None:
    alphas = supernet.alphas(names(supernet))
    before = snapshot(supernet)
    alpha_step(supernet.model, alphas, batch, make_alpha_optimizer(alphas, AlphaConfig()))
    assert changed(before, supernet) == alpha_names(supernet)
    assert all(weight.grad is None for weight in supernet.weights())
    assert supernet.model.training
    assert supernet.model.bn1.track_running_stats


def test_the_alpha_step_normalises_by_its_own_batch(
    supernet: Supernet, batch: tuple[Tensor, Tensor]
) -> None:
    """Running statistics of an untrained network would give another loss."""
    alphas = supernet.alphas(names(supernet))
    with torch.no_grad():
        logits = supernet.model(batch[0])
    expected = torch.nn.functional.cross_entropy(logits, batch[1]).item()
    optimizer = make_alpha_optimizer(alphas, AlphaConfig())
    loss, _ = alpha_step(supernet.model, alphas, batch, optimizer)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_weight_step_leaves_alpha(supernet: Supernet, batch: tuple[Tensor, Tensor]) -> None:
    weights = supernet.weights()
    optimizer, _ = make_weight_optimizer(weights, WeightConfig(), steps=10)
    before = snapshot(supernet)
    weight_step(supernet.model, weights, batch, optimizer, clip=5.0)
    moved = changed(before, supernet)
    assert not moved & alpha_names(supernet)
    assert {name for name in before if name.endswith(("weight", "running_mean"))} <= moved
    assert all(alpha.grad is None for alpha in supernet.alphas(names(supernet)))


def test_weights_and_alphas_are_all_parameters(supernet: Supernet) -> None:
    groups = [*supernet.weights(), *supernet.alphas(names(supernet))]
    assert len(groups) == len(set(groups))
    assert set(groups) == set(supernet.model.parameters())


def test_the_gradient_of_the_weights_is_clipped(
    supernet: Supernet, batch: tuple[Tensor, Tensor]
) -> None:
    weights = supernet.weights()
    optimizer, _ = make_weight_optimizer(weights, WeightConfig(), steps=10)
    weight_step(supernet.model, weights, batch, optimizer, clip=1e-3)
    norm = torch.stack([weight.grad.norm() for weight in weights]).norm()  # type: ignore[union-attr]
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_a_stopped_layer_runs_its_winner_and_its_alpha_rests(
    supernet: Supernet, batch: tuple[Tensor, Tensor]
) -> None:
    layers = names(supernet)
    optimizer = make_alpha_optimizer(supernet.alphas(layers), AlphaConfig(weight_decay=0.5))
    alpha_step(supernet.model, supernet.alphas(layers), batch, optimizer)
    stopped, still_open = layers[3], [*layers[:3], *layers[4:]]
    old = supernet.alpha(stopped)
    forget(optimizer, old)
    supernet.discretise(stopped, [4])
    assert old not in optimizer.state
    assert supernet.probabilities([stopped]) == {stopped: [1.0]}

    before = snapshot(supernet)
    alpha_step(supernet.model, supernet.alphas(still_open), batch, optimizer)
    moved = changed(before, supernet)
    assert moved == alpha_names(supernet) - {f"{stopped}.enhancer.pool.alpha"}
    assert supernet.alpha(stopped).grad is None
    assert not supernet.alpha(stopped).requires_grad
    assert len(optimizer.state) == 15

    weights = supernet.weights()
    sgd, _ = make_weight_optimizer(weights, WeightConfig(weight_decay=0.5), steps=10)
    weight_step(supernet.model, weights, batch, sgd, clip=5.0)
    assert torch.equal(supernet.alpha(stopped), before[f"{stopped}.enhancer.pool.alpha"])


def test_the_best_two_are_renormalised_and_fixed(supernet: Supernet) -> None:
    layer = names(supernet)[0]
    with torch.no_grad():
        supernet.alpha(layer).copy_(torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0, 1.0, 0.0]))
    supernet.discretise(layer, [1, 5])
    expected = torch.softmax(torch.tensor([2.0, 1.0]), 0).tolist()
    assert supernet.probabilities([layer])[layer] == pytest.approx(expected)
    assert not supernet.alpha(layer).requires_grad


def test_an_alpha_optimizer_may_be_empty() -> None:
    make_alpha_optimizer([], AlphaConfig()).step()
