"""The search in a training loop of someone else's: any loss, any batch, any network."""

import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from metapool_kernels import SpatialEnhancer
from metapool_kernels.search import PoolingSearch
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.method.bilevel import tilted
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.networks.derive import derive
from metapool_kernels.search.run.cost_table import CostTable, LayerCost
from metapool_kernels.search.settings.config import AlphaConfig, CostConfig, Method, StopConfig
from tests.search.runs import REPOSITORY
from tests.search.test_processes import launch

METHODS: list[Method] = ["first-order", "fomaml", "second-order", "finite-difference"]
CANDIDATES = ["skip_connect", "max_pool_3x3", "avg_pool_3x3"]
XI = 0.1


class Small(nn.Module):
    """Two places for an enhancer, BatchNorm, and two inputs if they are given."""

    def __init__(self, *, saving: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Tanh())
        self.mid = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)
        self.saving = saving

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        out = checkpoint(self.stem, x, use_reentrant=False) if self.saving else self.stem(x)
        out = self.mid(out if shift is None else out + shift)
        logits: Tensor = self.head(out.square().mean((2, 3)))
        return logits


def small(**how: Any) -> Small:
    torch.manual_seed(0)
    return Small(**how)


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 12, 12, generator=drawn), torch.arange(8) % 4


def begin(model: nn.Module, **how: Any) -> PoolingSearch:
    like = next(model.parameters())
    settings = {"epochs": 9, "warmup": 0.0, "candidates": CANDIDATES, "after": r"stem\.0|mid"}
    return PoolingSearch(model, torch.zeros(1, 3, 12, 12).to(like), **{**settings, **how})


def on(batch: tuple[Tensor, Tensor]) -> Callable[[nn.Module], Tensor]:
    return lambda net: F.cross_entropy(net(batch[0]), batch[1])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


def test_the_example_of_the_guide(tmp_path: Path) -> None:
    """As it stands there, on a network of torchvision."""
    guide = (REPOSITORY / "metapool_kernels" / "search" / "README.md").read_text()
    example = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0]
    assert "from metapool_kernels.search import PoolingSearch" in example
    model = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4
    )
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)
    given = {
        "model": model,
        "example": torch.zeros(1, 3, 32, 32),
        "train": DataLoader(data, 4),
        "validation": DataLoader(data, 4, shuffle=True),
        "loss": F.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "folder": tmp_path,
    }
    exec(example.replace("90", "3"), given)
    search, network = given["search"], given["network"]
    assert isinstance(search, PoolingSearch) and isinstance(network, nn.Module)
    assert len(search.stopping.stops) == 4
    assert not [m for m in network.modules() if isinstance(m, SpatialEnhancer)]
    assert network.eval()(given["example"]).shape == (1, 4)
    assert {"architecture.json", "report.html", "metrics.csv"} <= {
        p.name for p in tmp_path.iterdir()
    }


@pytest.mark.parametrize("method", ["first-order", "finite-difference"])
def test_a_network_for_segmentation_gives_a_dict(method: Method) -> None:
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    search = begin(
        model, after=r"backbone\.[46]\.block\.1", epochs=3, alpha=AlphaConfig(method=method, xi=XI)
    )
    batch = {"image": torch.randn(2, 3, 64, 64), "mask": torch.randint(3, (2, 64, 64))}

    def loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(batch["image"])["out"], batch["mask"])

    alphas = {f"{layer}.enhancer.pool.alpha" for layer in search.layers}
    before = state(model)
    for _ in range(2):
        found = search.alpha_step(loss, loss)
        assert found is not None and found.isfinite()
        assert changed(before, model) == alphas
        search.end_epoch()
    assert not search.stopping.open_layers
    assert search.derive().eval()(batch["image"])["out"].shape == (2, 3, 64, 64)


@pytest.mark.parametrize("method", ["first-order", "fomaml"])
def test_a_network_for_detection_has_its_losses_inside(method: Method) -> None:
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    search = PoolingSearch(
        model,
        [torch.zeros(3, 64, 64)],
        after=r"backbone\.body\.[46]\.block\.1",
        epochs=3,
        warmup=0,
        candidates=CANDIDATES,
        alpha=AlphaConfig(method=method, xi=1e-4),
    )
    assert search.backbone.image_shape == (3, 64, 64)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}]
    pictures = [torch.rand(3, 64, 64)]

    def loss(net: nn.Module) -> Tensor:
        return torch.stack(list(net(pictures, targets).values())).sum()

    before = state(model.train())
    for _ in range(2):
        search.alpha_step(loss, loss)
        search.end_epoch()
    assert not search.stopping.open_layers
    unchanged = [name for name in before if not name.endswith("alpha")]
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in unchanged)
    assert "boxes" in search.derive().eval()(pictures)[0]


@pytest.mark.parametrize("example", ["tuple", "dict"])
def test_a_network_with_several_inputs(example: str) -> None:
    x, shift = torch.zeros(2, 3, 12, 12), torch.zeros(2, 6, 6, 6)
    given = (x, shift) if example == "tuple" else {"shift": shift, "x": x}
    search = PoolingSearch(small(), given, r"mid", epochs=3, warmup=0)
    batch, targets = images()
    (site,) = search.supernet.sites
    assert site.map_size == (6, 6)
    assert search.alpha_step(lambda net: F.cross_entropy(net(batch, torch.ones(6, 1, 1)), targets))


def by_hand(search: PoolingSearch, method: Method, task: int | None, tilt: float) -> list[Tensor]:
    """The gradient in alpha, by ``torch.func`` and nothing of ours but the tilt."""
    model = search.supernet.model
    names = [search.supernet.alpha_name(layer) for layer in search.layers]
    weights = {n: p.detach() for n, p in model.named_parameters() if n not in names}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    alphas = {name: model.get_parameter(name).detach() for name in names}

    def loss(w: dict[str, Tensor], a: dict[str, Tensor], seed: int) -> Tensor:
        mixed = dict(zip(a, tilted(list(a.values()), task, tilt), strict=True))
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        x, y = images(seed)
        return F.cross_entropy(functional_call(model, {**w, **mixed, **fresh}, (x.double(),)), y)

    def reached(a: dict[str, Tensor], through: bool = True) -> Tensor:
        if method == "first-order":
            return loss(weights, a, 1)
        inner = a if through else alphas
        slope = torch.func.grad(loss)(weights, inner, 2)
        return loss({n: w - XI * slope[n] for n, w in weights.items()}, a, 1)

    through = method in ("second-order", "finite-difference")
    return list(torch.func.grad(lambda a: reached(a, through))(alphas).values())


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
@pytest.mark.parametrize("tilt", [0.0, 1.2])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_torch_func(
    method: Method, tilt: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of losses that are multiplied, as for float16."""
    # Short enough that no maximum moves to another pixel in between: there the loss has a kink.
    monkeypatch.setattr("metapool_kernels.search.method.bilevel.DIFFERENCE_LENGTH", 1e-6)
    search = begin(small().double(), alpha=AlphaConfig(method=method, tilt=tilt, tasks=1))
    batches = [(x.double(), y) for x, y in map(images, (1, 2))]
    with torch.random.fork_rng():
        found = search.gradient(on(batches[0]), on(batches[1]), xi=XI, scale=scale)
    drawn = [None] if tilt == 0 else range(3)
    closest = min(
        max((a - b).abs().max().item() for a, b in zip(found.gradients, expected, strict=True))
        for expected in (by_hand(search, method, task, tilt) for task in drawn)
    )
    assert closest < (1e-7 if method == "finite-difference" else 1e-12)
    if method == "first-order" and tilt == 0:
        torch.testing.assert_close(found.loss, on(batches[0])(search.supernet.model).detach())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_alpha_leaves_weights_and_buffers_to_the_bit(method: Method) -> None:
    """And alpha alone where an optimizer holds all parameters."""
    model = small()
    search = begin(model, alpha=AlphaConfig(method=method))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1, momentum=0.9)
    alphas = {search.supernet.alpha_name(layer) for layer in search.layers}
    before = state(model)
    assert search.alpha_step(on(images(1)), on(images(2)), xi=XI) is not None
    assert changed(before, model) == alphas
    assert all(parameter.grad is None for parameter in model.parameters())
    before = state(model)
    on(images())(model).backward()
    optimizer.step()
    assert changed(before, model).isdisjoint(alphas)
    assert changed(before, model) >= {"mid.host.weight", "stem.1.running_mean"}


def test_nothing_is_learned_in_the_warm_up_and_after_the_last_stop() -> None:
    search = begin(small(), epochs=3, warmup=0.34)

    def never(net: nn.Module) -> Tensor:
        raise AssertionError("this loss is not needed")

    assert search.alpha_step(never) is None
    assert search.end_epoch() == []
    assert search.alpha_step(on(images())) is not None
    assert {stop.reason for stop in search.end_epoch()} == {"deadline"}
    assert search.alpha_step(never) is None
    assert search.step == 3
    assert [row["stopped"] for row in search.history] == [0, 2]
    assert search.history[0]["alpha_loss"] is None and search.history[1]["alpha_loss"] > 0


def test_what_is_open_is_derived_as_the_best() -> None:
    search = begin(small(), epochs=2)
    with torch.no_grad():
        search.supernet.alpha("mid")[1] = 5
    derived = search.derive().eval()
    assert search.stopping.open_layers == ["stem.0", "mid"]  # the network itself stays
    x = images()[0]
    with torch.no_grad():
        search.supernet.alpha("mid")[1] = 500
        best = search.supernet.alpha("stem.0").argmax()
        search.supernet.alpha("stem.0")[best] = 500
        torch.testing.assert_close(derived(x), search.supernet.model.eval()(x))


def test_losses_in_half_precision_do_not_vanish() -> None:
    """They are multiplied as those of the weights are; what overflows takes no step."""
    search = begin(small())
    x, y = images()

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return 1e-8 * net(x).half().float().gather(1, y[:, None]).mean()

    lost = search.gradient(loss).gradients
    found = search.gradient(loss, scale=2.0**16).gradients
    assert sum(gradient.abs().sum() for gradient in lost) == 0
    assert all(gradient.abs().sum() > 0 for gradient in found)
    before = state(search.supernet.model)
    search.alpha_step(lambda net: loss(net) * torch.inf, scale=2.0**16)
    assert changed(before, search.supernet.model) == set()
    search.alpha_step(loss, scale=2.0**16)
    assert changed(before, search.supernet.model)


def train(
    search: PoolingSearch,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    epochs: range,
    folder: Path | None = None,
) -> None:
    for epoch in epochs:
        for step in range(3):
            batches = [images(10 * epoch + step), images(1000 + 10 * epoch + step)]
            search.alpha_step(on(batches[1]), on(batches[0]), xi=XI)
            on(batches[0])(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        measured = (on(images(seed)) for seed in (1, 2))
        search.end_epoch(measured, numbers={"lr": 0.1}, optimizer=optimizer)
        if folder is not None:
            search.save(folder)


SEARCHES: dict[str, dict[str, Any]] = {
    "margin": {"stop": StopConfig(delta=0.02, ema=0.5)},
    "second order, tasks": {
        "alpha": AlphaConfig(method="second-order", tilt=1.4, tasks=2, lr=0.05),
        "stop": StopConfig(delta=0.02, ema=0.5),
    },
    "perturbation": {"stop": StopConfig(rule="perturbation", batches=2, patience=3)},
    "attention, normalised": {
        "extra_candidates": ["coordinate_attention"],
        "candidate_norm": True,
        "alpha": AlphaConfig(lr=0.1),
        "stop": StopConfig(delta=0.05, ema=0.5),
    },
}


@pytest.mark.parametrize("how", SEARCHES)
def test_a_search_goes_on_with_the_same_numbers(how: str, tmp_path: Path) -> None:
    settings = {"alpha": AlphaConfig(lr=0.1), "seed": 3, **SEARCHES[how]}

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)

    whole = begin(small(), **settings)
    train(whole, sgd(whole.supernet.model), whole.supernet.model, range(7))
    broken = begin(small(), **settings)
    optimizer = sgd(broken.supernet.model)
    stopped = [row["stopped"] for row in whole.history]
    assert 0 in stopped and (1 in stopped) is ("attention" in how)
    middle = stopped.index(2) - 1  # alpha has steps to take after it
    train(broken, optimizer, broken.supernet.model, range(middle + 1), tmp_path)
    torch.manual_seed(9)
    resumed = PoolingSearch.load(tmp_path, Small())
    again = sgd(resumed.supernet.model)
    again.load_state_dict(optimizer.state_dict())
    train(resumed, again, resumed.supernet.model, range(middle + 1, 7), tmp_path)
    assert resumed.history == whole.history
    assert resumed.trajectory == whole.trajectory
    assert resumed.stopping.stops == whole.stopping.stops
    assert resumed.stopped_alphas == whole.stopped_alphas
    assert changed(state(whole.supernet.model), resumed.supernet.model) == set()
    found = load_architecture(tmp_path / "architecture.json")
    assert {layer.name: layer.alpha for layer in found.layers} == whole.stopped_alphas
    with pytest.raises(UserError, match=r"Small.* num_classes"):  # it cannot be built again
        derive(found, 0)


def test_what_cannot_be_gone_on_with_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no search in"):
        PoolingSearch.load(tmp_path, small())
    search = begin(small())
    search.save(tmp_path)
    with pytest.raises(UserError, match="does not fit this network"):
        PoolingSearch.load(tmp_path, nn.Sequential(OrderedDict(mid=nn.Conv2d(3, 3, 1))))
    before = search.state_dict()
    search.alpha_step(on(images()))
    search.epoch = 8
    search.end_epoch()
    with pytest.raises(ValueError, match="layers have stopped that were open then"):
        search.load_state_dict(before)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_gradient(method: Method) -> None:
    found = [
        begin(small(saving=saving), alpha=AlphaConfig(method=method))
        .gradient(on(images(1)), on(images(2)), xi=XI)
        .gradients
        for saving in (False, True)
    ]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_is_searched_and_compiled_again_after_a_stop() -> None:
    """``eager`` compiles in a second; what is traced does not depend on the compiler."""
    searches = []
    for compiled in (False, True):
        search = begin(small(), alpha=AlphaConfig(lr=0.1), stop=StopConfig(delta=0.02, ema=0.5))
        own = search.supernet.model
        model = torch.compile(own, backend="eager") if compiled else own
        train(search, torch.optim.SGD(model.parameters(), 0.1), model, range(6))
        searches.append(search)
    assert not searches[0].stopping.open_layers
    assert searches[0].stopping.stops.keys() == searches[1].stopping.stops.keys()
    for one, other in zip(
        *(search.supernet.model.parameters() for search in searches), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_budget_is_told_and_kept_after_a_break(tmp_path: Path) -> None:
    costs = {"max_pool_3x3": 0.2, "avg_pool_3x3": 0.4}
    layers = [LayerCost("stem.0", 6, (6, 6), costs), LayerCost("mid", 6, (6, 6), costs)]
    probe = begin(small())
    table = CostTable("mine", "seconds", probe.backbone, skip=1.0, layers=layers)
    how = {"table": table, "cost": CostConfig(budget=1.2), "alpha": AlphaConfig(lr=0.1)}
    search = begin(small(), **how)
    train(
        search,
        torch.optim.SGD(search.supernet.model.parameters(), 0.1),
        search.supernet.model,
        range(2),
        tmp_path,
    )
    first, last = (row["expected_cost"] for row in search.history)
    assert 1.2 < last < first < 1.4
    other = PoolingSearch.load(tmp_path, Small())
    assert other.cost is not None and search.cost is not None
    assert other.cost.multiplier == search.cost.multiplier > 0
    with pytest.raises(UserError, match="the cost table lacks layer 'mid'"):
        begin(small(), table=CostTable("mine", "seconds", probe.backbone, 1.0, layers[:1]))


def test_a_cycle_goes_on_in_another_order_each_round() -> None:
    search = begin(small())
    data = TensorDataset(torch.arange(32))
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=2, rank=0)

    def rounds(found: Iterator[Any]) -> list[list[int]]:
        return [[n for _ in range(4) for n in next(found)[0].tolist()] for _ in range(2)]

    first, second = rounds(search.cycle(DataLoader(data, 4, sampler=sampler)))
    assert first != second and len(set(first)) == 16
    search.epoch = 1
    assert first not in rounds(search.cycle(DataLoader(data, 4, sampler=sampler)))
    with pytest.raises(ValueError, match="the loader gives no batch"):
        next(search.cycle(DataLoader(data, 64, drop_last=True)))


@pytest.mark.parametrize(
    "how, said",
    [
        ({"after": "nothing"}, "matches no module"),
        ({"example": torch.zeros(1, 4, 12, 12)}, "does not run on the example"),
        ({"example": {"y": torch.zeros(1)}}, "does not run on the example"),
        ({"candidates": ["max_pool_4x4"]}, "max_pool_4x4"),
        ({"candidates": ["max_pool_3x3", "max_pool_3x3"]}, "names one twice"),
    ],
)
def test_what_cannot_be_searched_is_said_and_nothing_begun(how: dict[str, Any], said: str) -> None:
    model = small()
    given = {"example": torch.zeros(1, 3, 12, 12), "after": "mid", "epochs": 9, **how}
    with pytest.raises(ValueError, match=said):
        PoolingSearch(model, **given)
    assert not [m for m in model.modules() if isinstance(m, SpatialEnhancer)]
    assert isinstance(model.mid, nn.Conv2d)


def test_what_a_step_lacks_is_said() -> None:
    search = begin(small(), alpha=AlphaConfig(method="fomaml"))
    with pytest.raises(ValueError, match="give the loss of that, inner="):
        search.alpha_step(on(images()))
    with pytest.raises(ValueError, match="give its size, xi="):
        search.alpha_step(on(images()), on(images()))
    search = begin(small(), stop=StopConfig(rule="perturbation"))
    search.alpha_step(on(images()))
    with pytest.raises(ValueError, match="measures losses at the end of an epoch"):
        search.end_epoch()
    model = search.supernet.model
    with pytest.raises(ValueError, match="with the network that it is called with"):
        search.alpha_step(lambda net: on(images())(model))
    with pytest.raises(UserError, match="alpha is never trained"):
        begin(small(), epochs=1, warmup=1.0)


def test_two_processes_agree(tmp_path: Path) -> None:
    """Each with its own batches, which decide together; the first alone writes."""
    done = launch("tests.search.pooling_ranks", str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert first["seen"] != second["seen"]
    assert first["stopped_alphas"] == second["stopped_alphas"]
    assert first["stopping"]["stops"] == second["stopping"]["stops"]
    assert len(first["stopping"]["stops"]) == 2
    assert {stop["reason"] for stop in first["stopping"]["stops"]} == {"perturbation"}
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(t, second["weights"][n]) for n, t in first["weights"].items())
    gradients = torch.stack([first["first"], second["first"]])
    assert not torch.equal(*gradients)
    torch.testing.assert_close(first["moved"], -0.5 * gradients.mean(0), rtol=1e-3, atol=1e-6)
    assert first["moved"].equal(second["moved"])
    found = load_architecture(tmp_path / "search" / "architecture.json")
    assert {layer.name: layer.alpha for layer in found.layers} == first["stopped_alphas"]


def test_importing_it_loads_no_more_than_it_needs() -> None:
    code = (
        "import sys; import metapool_kernels.search as s; assert 'timm' not in sys.modules\n"
        "s.PoolingSearch; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert {"accelerate", "matplotlib", "tensorboard"}.isdisjoint(done.stdout.split())
