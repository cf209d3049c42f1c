"""Each step of the two levels moves one group of parameters and nothing else."""

import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.processes import make_accelerator, prepare_model, seed_epoch
from metapool_kernels.search.method.bilevel import Hypergradient, hypergradient
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.supernet import Supernet, build_supernet
from metapool_kernels.search.settings.config import (
    AlphaConfig,
    Config,
    Method,
    ModelConfig,
    WeightConfig,
)
from metapool_kernels.search.training.objective import network_objective
from metapool_kernels.search.training.optimizers import (
    alpha_step,
    forget,
    make_alpha_optimizer,
    make_weight_optimizer,
)
from metapool_kernels.search.training.steps import to_device, weight_step
from tests.search.losses import loss_of

Batch = tuple[Tensor, Tensor]

ARGUMENTS = {"num_classes": 10, "in_chans": 1, "output_stride": 4, "drop_rate": 0.2}
SHALLOW = "metapool_kernels.search.networks.shallow:shallow_net"
METHODS: list[Method] = ["first-order", "fomaml", "second-order", "finite-difference"]


@pytest.fixture
def supernet() -> Supernet:
    backbone = Backbone("mobilenetv2_035", ARGUMENTS, False, (1, 16, 16))
    net = build_supernet(backbone, ModelConfig(extra_candidates=["coordinate_attention"]), seed=0)
    net.model.train()
    return net


@pytest.fixture
def batch() -> Batch:
    (moved,) = to_device([(torch.randn(8, 1, 16, 16), torch.arange(8))], torch.device("cpu"))
    return moved


def snapshot(net: Supernet) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.model.state_dict().items()}


def changed(before: Mapping[str, Tensor], net: Supernet) -> set[str]:
    return {n for n, value in net.model.state_dict().items() if not torch.equal(value, before[n])}


def names(net: Supernet) -> list[str]:
    return [site.name for site in net.sites]


def alpha_names(net: Supernet) -> set[str]:
    return {f"{name}.enhancer.pool.alpha" for name in names(net)}


def move_alpha(
    net: Supernet,
    layers: Sequence[str],
    batch: Batch,
    optimizer: Optimizer,
    method: Method = "first-order",
) -> tuple[Tensor, Tensor]:
    weights = net.weights()
    found = hypergradient(
        network_objective(net.model, list(weights), [net.alpha_name(layer) for layer in layers]),
        list(weights.values()),
        net.alphas(layers),
        loss_of(batch),
        loss_of(batch),
        method=method,
        xi=0.1,
    )
    return alpha_step(net.alphas(layers), optimizer, [found]), found.beside[0]


def move_weights(net: Supernet, batch: Batch, config: WeightConfig | None = None) -> None:
    config = config or WeightConfig()
    optimizer, _ = make_weight_optimizer(list(net.weights().values()), config, steps=10)
    weight_step(Accelerator(), net.model, [batch], optimizer, config)


@pytest.mark.parametrize("method", METHODS)
def test_the_alpha_step_moves_alpha_alone(supernet: Supernet, batch: Batch, method: Method) -> None:
    layers = names(supernet)
    before = snapshot(supernet)
    optimizer = make_alpha_optimizer(supernet.alphas(layers), AlphaConfig())
    move_alpha(supernet, layers, batch, optimizer, method)
    assert changed(before, supernet) == alpha_names(supernet)
    assert all(weight.grad is None for weight in supernet.weights().values())
    assert supernet.model.training
    assert not any(alpha.requires_grad for alpha in supernet.alphas(layers))


@pytest.mark.parametrize("method", METHODS)
def test_the_alpha_step_leaves_the_statistics_of_normalised_poolings(method: Method) -> None:
    """Also those of a layer that has stopped, which takes no part in it."""
    backbone = Backbone(SHALLOW, {"num_classes": 10, "in_chans": 1, "width": 8}, True, (1, 8, 8))
    config = ModelConfig(
        insert_after=r"blocks\.\d+\.depthwise",
        candidates=["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"],
        count_include_pad=False,
        candidate_norm=True,
    )
    net = build_supernet(backbone, config, seed=0)
    images = torch.randn(16, 1, 8, 8)
    net.model.train()(images)
    open_layer, stopped = names(net)
    net.discretise(stopped, [1])
    before = snapshot(net)
    statistics = {f"{layer}.enhancer.pool.running_var" for layer in names(net)}
    assert statistics <= before.keys() and not any(before[name].eq(1).all() for name in statistics)
    optimizer = make_alpha_optimizer(net.alphas([open_layer]), AlphaConfig())
    move_alpha(net, [open_layer], (images, torch.arange(16) % 10), optimizer, method)
    assert changed(before, net) == {f"{open_layer}.enhancer.pool.alpha"}
    move_weights(net, (images, torch.arange(16) % 10))
    assert statistics <= changed(before, net)


def test_several_hypergradients_are_averaged() -> None:
    alpha = torch.zeros(3)
    gradients = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 0.0, 1.0])
    found = [
        Hypergradient([gradient], torch.tensor(loss))
        for gradient, loss in zip(gradients, (1.0, 4.0), strict=True)
    ]
    optimizer = torch.optim.SGD([alpha], lr=1.0)
    loss = alpha_step([alpha], optimizer, found)
    torch.testing.assert_close(alpha, torch.tensor([-2.0, -1.0, -2.0]))
    assert loss == 2.5 and alpha.grad is None


def test_labels_are_smoothed_in_both_levels() -> None:
    images, targets = torch.randn(8, 5), torch.arange(8) % 3
    model = nn.Linear(5, 3)
    expected = nn.functional.cross_entropy(model(images), targets, label_smoothing=0.2)
    names, weights = zip(*model.named_parameters(), strict=True)
    loss, _ = network_objective(model, names, [])(
        weights, [], loss_of((images, targets), label_smoothing=0.2)
    )
    torch.testing.assert_close(loss, expected)
    config = WeightConfig(label_smoothing=0.2)
    optimizer, _ = make_weight_optimizer(list(weights), config, steps=10)
    loss, _ = weight_step(Accelerator(), model, [(images, targets)], optimizer, config)
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_both_levels_compute_in_the_precision(precision: str, dtype: torch.dtype) -> None:
    """And the network is left as it was, to be taken apart; losses are float32."""
    dtypes: list[torch.dtype] = []
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())
    model[0].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    batch = torch.randn(4, 1, 3, 3), torch.arange(4) % 3
    accelerator = make_accelerator(Config(output="none", precision=precision))  # type: ignore
    names, weights = zip(*model.named_parameters(), strict=True)
    for _ in range(2):  # as after each stop
        assert prepare_model(accelerator, model) is model and "forward" not in vars(model)
        objective = network_objective(model, names, [])
        loss, _ = objective(weights, [], loss_of(batch, autocast=accelerator.autocast))
        config = WeightConfig()
        optimizer, _ = make_weight_optimizer(list(weights), config, steps=10)
        stepped, _ = weight_step(accelerator, model, [batch], optimizer, config)
        assert loss.dtype is stepped.dtype is torch.float32
    assert dtypes == [dtype] * 4


def test_the_alpha_step_normalises_by_its_own_batch(supernet: Supernet, batch: Batch) -> None:
    """Running statistics of an untrained network would give another loss."""
    layers = names(supernet)
    optimizer = make_alpha_optimizer(supernet.alphas(layers), AlphaConfig())
    torch.manual_seed(5)
    loss, accuracy = move_alpha(supernet, layers, batch, optimizer)
    net = build_supernet(
        Backbone("mobilenetv2_035", ARGUMENTS, False, (1, 16, 16)),
        ModelConfig(extra_candidates=["coordinate_attention"]),
        seed=0,
    )
    torch.manual_seed(5)
    with torch.no_grad():
        logits = net.model.train()(batch[0])
    expected = nn.functional.cross_entropy(logits, batch[1])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    correct = (logits.argmax(1) == batch[1]).sum().item()
    assert accuracy.item() == pytest.approx(100 * correct / 8)


def test_the_weight_step_leaves_alpha(supernet: Supernet, batch: Batch) -> None:
    before = snapshot(supernet)
    move_weights(supernet, batch)
    moved = changed(before, supernet)
    assert not moved & alpha_names(supernet)
    assert {name for name in before if name.endswith(("weight", "running_mean"))} <= moved
    assert all(alpha.grad is None for alpha in supernet.alphas(names(supernet)))


def test_weights_and_alphas_are_all_parameters(supernet: Supernet) -> None:
    groups = [*supernet.weights().values(), *supernet.alphas(names(supernet))]
    assert len(groups) == len(set(groups))
    assert set(groups) == set(supernet.model.parameters())


def test_several_batches_make_one_step_of_their_mean_gradient() -> None:
    """Without BatchNorm, whose statistics are those of each batch."""
    config = WeightConfig(optimizer="momentum", lr=0.1, momentum=0.0, weight_decay=0.0, clip=1e9)
    images, targets = torch.randn(8, 5), torch.arange(8) % 3
    ends = []
    for cuts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer, _ = make_weight_optimizer(list(model.parameters()), config, steps=10)
        batches = [(images[cut], targets[cut]) for cut in cuts]
        accelerator = Accelerator(gradient_accumulation_steps=len(batches))
        weight_step(accelerator, model, batches, optimizer, config)
        assert all(p.grad is None for p in model.parameters())
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])
    torch.manual_seed(0)
    assert not torch.equal(ends[0], nn.Linear(5, 3).weight)


def test_the_gradient_of_the_weights_is_clipped(supernet: Supernet, batch: Batch) -> None:
    config = WeightConfig(momentum=0.0, weight_decay=0.0, lr=1.0, clip=1e-3)
    before = {name: weight.detach().clone() for name, weight in supernet.weights().items()}
    move_weights(supernet, batch, config)
    moved = [weight.detach() - before[name] for name, weight in supernet.weights().items()]
    norm = torch.stack([part.norm() for part in moved]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_a_stopped_layer_runs_its_winner_and_its_alpha_rests(
    supernet: Supernet, batch: Batch
) -> None:
    layers = names(supernet)
    optimizer = make_alpha_optimizer(supernet.alphas(layers), AlphaConfig(weight_decay=0.5))
    move_alpha(supernet, layers, batch, optimizer)
    stopped, still_open = layers[3], [*layers[:3], *layers[4:]]
    old = supernet.alpha(stopped)
    forget(optimizer, old)
    lost = supernet.discretise(stopped, [4])
    assert old not in optimizer.state
    assert supernet.probabilities([stopped]) == {stopped: [1.0]}
    assert supernet.choice(stopped) == ["avg_pool_3x3"]
    weights = list(supernet.weights().values())
    assert lost and not any(weight is other for weight in lost for other in weights)

    before = snapshot(supernet)
    move_alpha(supernet, still_open, batch, optimizer)
    assert changed(before, supernet) == alpha_names(supernet) - {supernet.alpha_name(stopped)}
    assert supernet.alpha(stopped).grad is None
    assert len(optimizer.state) == 15

    move_weights(supernet, batch, WeightConfig(weight_decay=0.5))
    assert torch.equal(supernet.alpha(stopped), before[supernet.alpha_name(stopped)])


def test_the_best_two_are_renormalised_and_fixed(supernet: Supernet) -> None:
    layer = names(supernet)[0]
    with torch.no_grad():
        supernet.alpha(layer).copy_(torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]))
    supernet.discretise(layer, [1, 5])
    expected = torch.softmax(torch.tensor([2.0, 1.0]), 0).tolist()
    assert supernet.probabilities([layer])[layer] == pytest.approx(expected)
    assert not supernet.alpha(layer).requires_grad


def test_an_alpha_optimizer_may_be_empty() -> None:
    make_alpha_optimizer([], AlphaConfig()).step()


@pytest.mark.parametrize("name", ["momentum", "sgd", "lamb", "adamw"])
def test_optimizers_of_timm_go_by_name(name: str) -> None:
    config = WeightConfig(optimizer=name, lr=0.1, lr_warmup=0.2, weight_decay=0.0)
    model = nn.Linear(3, 2)
    optimizer, schedule = make_weight_optimizer(list(model.parameters()), config, steps=10)
    rates = []
    for step in range(10):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0 and rates[1] == pytest.approx(0.05)
    assert max(rates) == rates[2] <= 0.1 and rates[-1] < 0.01


def test_an_optimizer_that_there_is_not() -> None:
    with pytest.raises(UserError, match="nonesuch"):
        make_weight_optimizer([torch.zeros(1)], WeightConfig(optimizer="nonesuch"), steps=1)


def test_an_optimizer_that_needs_more_than_gradients() -> None:
    with pytest.raises(UserError, match="second derivatives"):
        make_weight_optimizer([torch.zeros(1)], WeightConfig(optimizer="adahessian"), steps=1)


def test_each_epoch_draws_other_numbers_and_the_same_ones_again() -> None:
    def draw(seed: int, epoch: int) -> tuple[int, float, float, float]:
        number = seed_epoch(Accelerator(), seed, epoch)
        return number, torch.rand(1).item(), float(np.random.rand()), random.random()

    moments = [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = [draw(*moment) for moment in moments]
    assert all(len(set(numbers)) == 4 for numbers in zip(*drawn, strict=True))
    assert [draw(*moment) for moment in moments] == drawn
