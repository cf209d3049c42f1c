"""Expected cost in the upper level: its gradient, its budget, and what a search makes of them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from metapool_kernels.search.cli import main
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.method.bilevel import importances
from metapool_kernels.search.method.expected_cost import ExpectedCost
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.run.cost_table import FORMAT, CostTable, LayerCost
from metapool_kernels.search.settings.config import CostConfig
from metapool_kernels.search.settings.config_file import load_config
from tests.search.runs import SHALLOW, metrics, options
from tests.search.test_processes import tell
from tests.search.test_resume import assert_same, break_off

COSTS = {"a": [0.0, 0.3, 0.5], "b": [0.2, 0.1, 0.0], "c": [0.0, 0.4, 0.1]}


def expected(rate: float = 0.1, **settings: Any) -> ExpectedCost:
    return ExpectedCost(COSTS, CostConfig(**settings), rate)


def draw(layers: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(layers, 3, generator=generator, dtype=torch.float64))


def test_the_gradient_is_that_of_the_weighted_cost() -> None:
    cost, alphas = expected(weight=1.5), draw()
    gradients = cost.step(alphas)
    assert gradients is not None
    for i in range(3):
        for k in range(3):
            ends = []
            for sign in (1, -1):
                moved = [other.clone() for other in alphas]
                moved[i][k] += sign * 1e-6
                ends.append(1.5 * cost.of(moved))
            torch.testing.assert_close(
                gradients[i][k], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-9
            )
    assert cost.multiplier == 1.5 and not any(alpha.requires_grad for alpha in alphas)


def test_equal_probabilities_cost_the_mean_and_stopped_layers_what_they_keep() -> None:
    cost = expected()
    assert cost.of([torch.zeros(3)] * 3).item() == pytest.approx(1 + 0.8 / 3 + 0.3 / 3 + 0.5 / 3)
    cost.settle("b", [1])
    assert cost.of([torch.zeros(3)] * 2).item() == pytest.approx(1 + 0.8 / 3 + 0.1 + 0.5 / 3)
    cost.settle("a", [2, 1])  # both run
    cost.settle("c", [0])
    assert cost.of([]).item() == pytest.approx(1 + 0.8 + 0.1)
    assert cost.numbers([]) == {"expected_cost": cost.of([]).item(), "cost_weight": 0.0}


def test_without_weight_nothing_is_added() -> None:
    cost, objective = expected(), lambda weights, alphas, batch: (torch.tensor(2.0), batch)
    assert cost.step(draw()) is None
    assert cost.beside(objective, draw()) is objective


def test_a_dear_candidate_is_missed_less() -> None:
    """To leave one out costs what the loss rises by, and saves what it costs."""

    def objective(weights: Sequence[Tensor], alphas: Sequence[Tensor], batch: Any) -> Any:
        return torch.zeros((), dtype=torch.float64), torch.tensor(0.0)

    cost, alphas = expected(weight=2.0), draw()
    found = importances(cost.beside(objective, alphas), [], alphas, [None])
    for i, costs in enumerate(COSTS.values()):
        p = alphas[i].softmax(0)
        whole = (p * torch.tensor(costs)).sum()
        for k in range(3):
            without = (whole - p[k] * costs[k]) / (1 - p[k])
            torch.testing.assert_close(found[i][k], 2 * (without - whole), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("budget", [1.15, 1.6])
def test_a_budget_is_held(budget: float) -> None:
    """Eight layers whose dearer candidates are the better ones, under a noisy gradient."""
    generator = torch.Generator().manual_seed(1)
    costs = 0.15 * torch.rand(8, 7, generator=generator)
    costs[:, 0] = 0
    gains = 2 * costs + 0.1 * torch.rand(8, 7, generator=generator)
    layers = {str(i): row for i, row in enumerate(costs.tolist())}
    cost = ExpectedCost(layers, CostConfig(budget=budget), alpha_lr=0.05)
    alphas = [torch.zeros(7, requires_grad=True) for _ in layers]
    optimizer = torch.optim.Adam(alphas, 0.05, betas=(0.5, 0.999), weight_decay=1e-3)
    seen = []
    for _ in range(400):
        loss = -sum((a.softmax(0) * gain).sum() for a, gain in zip(alphas, gains, strict=True))
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        for alpha, gradient in zip(alphas, cost.step(alphas) or [0.0] * 8, strict=True):
            assert alpha.grad is not None
            alpha.grad += gradient + 0.02 * torch.randn(7, generator=generator)
        optimizer.step()
        seen.append(cost.of(alphas).item())
    assert 1 + gains.argmax(1).eq(0).sum() < 2  # without a budget nearly all would be dear
    assert sum(seen[-100:]) / 100 == pytest.approx(budget, rel=0.03)
    assert cost.multiplier > 0


def test_the_multiplier_never_falls_below_nothing() -> None:
    cost = expected(budget=5.0, weight=0.5)
    for _ in range(10):
        cost.step(draw())
    assert cost.multiplier == 0 and cost.step(draw()) is None


def test_a_budget_that_no_choice_keeps_is_refused() -> None:
    assert expected(budget=1.0).multiplier == 0
    with pytest.raises(UserError, match=r"search.cost.budget 0.9 cannot be kept: .* makes 1"):
        expected(budget=0.9)


def test_what_was_found_beyond_the_budget_is_told() -> None:
    cost = expected(budget=1.4)
    for layer, keep in (("a", [1]), ("b", [0]), ("c", [0])):
        cost.settle(layer, keep)
    (line,) = cost.warnings()
    assert "1.500 times" in line and "search.cost.budget is 1.4" in line
    assert expected(budget=5.0).warnings() == []


def shallow_table(folder: Path, *layers: dict[str, float]) -> Path:
    """Costs of the two layers of the small runs, as shares of the network with skip_connect."""
    arguments = {"width": 8, "num_classes": 10, "in_chans": 1}
    backbone = Backbone(str(SHALLOW["model__name"]), arguments, False, (1, 16, 16))
    costs = [LayerCost(f"blocks.{i}.depthwise", 8, (8, 8), of) for i, of in enumerate(layers)]
    path = folder / "costs.json"
    path.write_text(FORMAT.to_json(CostTable("by hand", "joules", backbone, 1.0, costs, none=0.9)))
    return path


METHODS = [
    "first-order",
    pytest.param("fomaml", marks=pytest.mark.costly),
    pytest.param("second-order", marks=pytest.mark.costly),
    pytest.param("finite-difference", marks=pytest.mark.costly),
]
FIRST_DEAR = {"max_pool_3x3": 0.5, "avg_pool_3x3": 0.25}
SECOND_DEAR = {"max_pool_3x3": 0.25, "avg_pool_3x3": 0.5}


def search(output: Path, *extra: str, **changes: Any) -> Path:
    assert main(["search", *options(output, **SHALLOW | changes), *extra]) == 0
    return output


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow_table(tmp_path_factory.mktemp("table"), FIRST_DEAR, SECOND_DEAR)


@pytest.mark.usefixtures("quick_pictures")
def test_a_search_that_only_takes_note_of_costs_is_the_same(tmp_path: Path, table: Path) -> None:
    plain = search(tmp_path / "plain")
    noted = search(tmp_path / "noted", search__cost__file=table)
    assert (plain / "architecture.json").read_text() == (noted / "architecture.json").read_text()
    rows = metrics(noted)
    found = json.loads((noted / "architecture.json").read_text())["layers"]
    spent = sum(
        costs.get(name, 0.0)
        for costs, layer in zip((FIRST_DEAR, SECOND_DEAR), found, strict=True)
        for name in layer["choice"]
    )
    assert float(rows[-1]["expected_cost"]) == pytest.approx(1 + spent)
    assert {row.pop("cost_weight") for row in rows} == {"0.0"}
    for row in rows:
        del row["expected_cost"]
    assert rows == metrics(plain)
    tensors = [load_file(run / "weights.safetensors") for run in (plain, noted)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert not (plain / "cost.json").exists()
    assert FORMAT.load(noted / "cost.json") == FORMAT.load(table)


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize("method", METHODS)
def test_a_large_weight_chooses_the_cheapest_everywhere(method: str, tmp_path: Path) -> None:
    """The other way round than the search without costs chooses."""
    table = shallow_table(tmp_path, SECOND_DEAR, FIRST_DEAR)
    run = search(
        tmp_path / "run",
        model__candidates=["max_pool_3x3", "avg_pool_3x3"],
        search__alpha__method=method,
        search__alpha__tilt=0.5,
        search__cost__file=table,
        search__cost__weight=100,
        search__stop__keep="top-1",
    )
    layers = json.loads((run / "architecture.json").read_text())["layers"]
    assert [layer["choice"] for layer in layers] == [["max_pool_3x3"], ["avg_pool_3x3"]]
    assert {row["cost_weight"] for row in metrics(run)} == {"100.0"}


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize(
    ("rule", "epoch"),
    [("margin", 4), pytest.param("perturbation", 2, marks=pytest.mark.costly)],
)
def test_a_search_with_a_budget_goes_on_with_the_same_numbers(
    rule: str, epoch: int, tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "costs.json"
    shutil.copy(table, file)
    changes = {"search__cost__file": file, "search__cost__budget": 1.2, "search__stop__rule": rule}
    changes |= {"search__cost__weight": 0.25, "search__stop__delta": 0.4}
    whole, broken = search(tmp_path / "whole", **changes), tmp_path / "broken"
    weights = [float(row["cost_weight"]) for row in metrics(whole)]
    assert len(set(weights)) > 2
    break_off(epoch, ["search", *options(broken, **SHALLOW | changes)], monkeypatch)
    if rule == "margin":  # the run keeps its own
        file.write_text(file.read_text().replace("0.25", "0.125"))
    else:
        file.unlink()
    search(broken, "--resume", **changes)
    assert_same(whole, broken)
    assert (whole / "architecture.json").read_text() == (broken / "architecture.json").read_text()


@pytest.mark.costly
def test_two_processes_count_the_same(tmp_path: Path, table: Path) -> None:
    changes = SHALLOW | {"data__batch_size": 8, "search__cost__budget": 1.2}
    first, second = tell(tmp_path, options(tmp_path / "run", search__cost__file=table, **changes))
    assert first == second
    assert len({row["cost_weight"] for row in metrics(tmp_path / "run")}) > 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"search__cost__weight": 0.1}, "need search.cost.file"),
        ({"search__cost__budget": 1.5}, "need search.cost.file"),
        ({"search__cost__weight": -1}, "search.cost.weight"),
        ({"search__cost__budget": 0}, "search.cost.budget"),
        ({"search__cost__file": "/no/such.json"}, "/no/such.json"),
        ({"search__cost__file": "TABLE", "model__arguments": {"width": 16}}, "another network"),
        ({"search__cost__file": "TABLE", "search__cost__budget": 0.5}, "cannot be kept"),
        (
            {"search__cost__file": "TABLE", "model__candidates": ["max_pool_5x5"]},
            "search.cost.file lacks max_pool_5x5 in layer 'blocks.0.depthwise'",
        ),
    ],
)
def test_settings_of_costs_that_do_not_work(
    changes: dict[str, Any],
    named: str,
    tmp_path: Path,
    table: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = {key: table if value == "TABLE" else value for key, value in changes.items()}
    assert main(["search", *options(tmp_path / "run", **SHALLOW | filled)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "run").exists()


def test_settings_from_before_there_were_costs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("output: run\nsearch: {epochs: 3}\n")
    assert load_config(tmp_path / "config.yaml").search.cost == CostConfig()
