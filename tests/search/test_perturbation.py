"""Choice by perturbation: what the loss says when a candidate is left out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import MetaPool2d
from metapool_kernels.search.cli import main
from metapool_kernels.search.method.bilevel import importances
from metapool_kernels.search.method.stopping import ProgressiveStopping, Stop
from metapool_kernels.search.settings.config import StopConfig
from metapool_kernels.search.training.objective import network_objective
from tests.search.losses import loss_of
from tests.search.runs import options


def linear(costs: Tensor) -> Any:
    """A loss that is linear in the weights of the mixture, so that all can be told in advance."""

    def objective(
        weights: Sequence[Tensor], alphas: Sequence[Tensor], batch: float
    ) -> tuple[Tensor, Tensor]:
        mixtures = torch.stack([alpha.softmax(0) for alpha in alphas])
        return batch * (mixtures * costs).sum(), torch.tensor(0.0)

    return objective


def test_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    alphas = list(torch.randn(2, 4, generator=generator, dtype=torch.float64))
    before = [alpha.clone() for alpha in alphas]
    found = importances(linear(costs), [], alphas, [1.0, 3.0])
    for layer, alpha in enumerate(alphas):
        p = alpha.softmax(0)
        whole = (p * costs[layer]).sum()
        for k in range(4):
            # The others keep their proportions and sum to one.
            without = (whole - p[k] * costs[layer, k]) / (1 - p[k])
            torch.testing.assert_close(found[layer][k], 2 * (without - whole))
    assert all(torch.equal(*pair) for pair in zip(alphas, before, strict=True))


def test_a_single_candidate_cannot_be_left_out() -> None:
    (found,) = importances(linear(torch.ones(1, 1)), [], [torch.zeros(1)], [1.0])
    assert found.tolist() == [0]


def test_size_of_alpha_is_not_importance() -> None:
    """Two candidates that do the same share the weight; a third with less weight is needed more."""
    pool = MetaPool2d(["avg_pool_3x3", "avg_pool_3x3", "none"])
    with torch.no_grad():
        pool.alpha.copy_(torch.tensor([1.0, 1.0, 0.5]))
    network = nn.Sequential(pool, nn.Flatten(), nn.Linear(64, 2, bias=False)).eval()
    with torch.no_grad():  # the less is left of the image, the surer is class 1
        network[2].weight.copy_(torch.tensor([[0.1], [-0.1]]).expand(2, 64))
    objective = network_objective(network, [], ["0.alpha"])
    batch = (torch.ones(4, 1, 8, 8), torch.ones(4, dtype=torch.long))
    (found,) = importances(objective, [], [pool.alpha], [loss_of(batch)])
    assert pool.alpha[2] < pool.alpha[0]
    assert found[0] == found[1] < found[2]


def test_random_layers_draw_the_same_for_every_candidate() -> None:
    """Dropout would else hide what leaving out a candidate of weight almost zero does: nothing."""
    torch.manual_seed(0)
    pool = MetaPool2d(["skip_connect", "none", "max_pool_3x3"])
    with torch.no_grad():
        pool.alpha.copy_(torch.tensor([0.0, 0.0, -200.0]))
    network = nn.Sequential(pool, nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2)).train()
    objective = network_objective(network, [], ["0.alpha"])
    batch = (torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    state = torch.get_rng_state()
    (found,) = importances(objective, [], [pool.alpha], [loss_of(batch)])
    assert found[2] == 0 and found[0] != 0
    assert torch.equal(torch.get_rng_state(), state)


def rule(**settings: Any) -> ProgressiveStopping:
    config = StopConfig(**{"rule": "perturbation", "ema": 0.0, **settings})
    return ProgressiveStopping(["a", "b"], config, deadline=9)


def check(stopping: ProgressiveStopping, epoch: int, a: list[float], b: list[float]) -> list[Stop]:
    stopping.update({"a": [0.5, 0.3, 0.2], "b": [0.5, 0.3, 0.2]})
    stops = stopping.check(epoch, {"a": a, "b": b})
    stopping.fix(stops)
    return stops


def test_the_loss_decides_and_not_alpha() -> None:
    stopping = rule(patience=2)
    assert check(stopping, 1, a=[0.1, 0.0, 0.2], b=[0.1, 0.2, 0.0]) == []
    (stop,) = check(stopping, 2, a=[0.1, -0.1, 0.3], b=[0.3, 0.2, 0.0])
    assert (stop.layer, stop.keep, stop.reason) == ("a", (2,), "perturbation")
    assert stop.probability == 0.2 and stop.margin == pytest.approx(-0.3)
    assert stop.importances == (0.1, -0.1, 0.3)


def test_the_deadline_keeps_those_that_are_needed_most() -> None:
    stopping = rule(patience=99, keep="top-2")
    stops = check(stopping, 9, a=[0.0, 0.1, 0.2], b=[0.2, 0.0, 0.1])
    assert [stop.keep for stop in stops] == [(2, 1), (0, 2)]
    assert {stop.reason for stop in stops} == {"deadline"}


@pytest.mark.parametrize("progressive", [True, False])
def test_nothing_is_measured_that_nobody_looks_at(progressive: bool) -> None:
    for name in ("margin", "perturbation"):
        stopping = ProgressiveStopping(
            ["a"], StopConfig(rule=name), deadline=9, progressive=progressive
        )
        assert not stopping.asks_for_importances(9)  # alpha has not been trained yet
        stopping.update({"a": [0.6, 0.4]})
        assert stopping.asks_for_importances(5) is (name == "perturbation" and progressive)
        assert stopping.asks_for_importances(9) is (name == "perturbation")


@pytest.mark.usefixtures("quick_pictures")
def test_a_search_by_perturbation(tmp_path: Path) -> None:
    changes = {"search__stop__rule": "perturbation", "search__stop__batches": 2}
    arguments = options(tmp_path / "run", search__epochs=6, **changes)
    assert main(["search", *arguments]) == 0
    layers = json.loads((tmp_path / "run" / "architecture.json").read_text())["layers"]
    assert "perturbation" in {layer["reason"] for layer in layers}
    for layer in layers:
        rises = dict(
            zip(["skip_connect", "max_pool_3x3", "avg_pool_3x3"], layer["importances"], strict=True)
        )
        best = sorted(rises, key=lambda name: -rises[name])
        assert set(layer["choice"]) == set(best[: len(layer["choice"])])
        assert any(rises.values())
    report = (tmp_path / "run" / "report.html").read_text()
    assert "perturbation, loss on 2 batches" in report
