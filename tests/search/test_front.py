"""Accuracy against cost: in the evaluation, in words, in the picture and on the page."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer

from metapool_kernels.search.cli import main
from metapool_kernels.search.commands.plot import draw
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.report.front_figure import Point, front, front_figure
from metapool_kernels.search.report.page import report_page
from metapool_kernels.search.run.results import Results, load_results
from metapool_kernels.search.run.run_folder import FRONT, RunFolder
from metapool_kernels.search.settings.config_file import to_yaml
from tests.search.run_by_hand import HEAD, SEARCH, evaluation, table, write_run
from tests.search.runs import SHALLOW, options
from tests.search.test_expected_cost import FIRST_DEAR, SECOND_DEAR, shallow_table
from tests.search.test_page import Page

COSTS = {"searched": 0.006, "none": 0.004, "uniform": 0.012}


def evaluated(costs: dict[str, float], target: str = "onnx") -> dict[str, Any]:
    """An evaluation with costs, in seconds, where skip_connect everywhere takes 5 ms."""
    found = evaluation()
    for name, cost in costs.items():
        for seed in found["networks"][name]["seeds"].values():
            seed["cost"] = cost
    return found | {"cost": {"target": target, "unit": "seconds", "skip": 0.005}}


def results(folder: Path, weight: float = 0.1, **changes: Any) -> Results:
    found = load_results(RunFolder(write_run(folder, evaluated(**{"costs": COSTS} | changes))))
    found.config.search.cost.weight = weight
    return found


def test_the_front_is_what_no_other_beats() -> None:
    numbers = [(3.0, 90.0), (1.0, 80.0), (2.0, 79.0), (3.0, 91.0), (5.0, 91.0), (9.0, 95.0)]
    points = [Point("", "k", cost, accuracy, None) for cost, accuracy in numbers]
    assert [(p.cost, p.accuracy) for p in front(points)] == [(1, 80), (3, 91), (9, 95)]


def test_the_picture_shows_each_network_where_it_is(tmp_path: Path) -> None:
    own = results(tmp_path / "own")
    other = results(tmp_path / "other", weight=0.5, costs=COSTS | {"searched": 0.005})
    figure = front_figure(own, [other])
    (panel,) = figure.axes
    shown = {}
    for bars in panel.containers:
        assert isinstance(bars, ErrorbarContainer)
        line, _, (lengths,) = bars.lines
        (segment,) = lengths.get_segments()
        shown[line.get_marker(), round(float(line.get_xdata()[0]), 6)] = (
            float(line.get_ydata()[0]),
            float(segment[1][1] - segment[0][1]) / 2,
        )
    # In milliseconds; the standard error over two seeds is the deviation by the root of two.
    assert shown.keys() == {("*", 6.0), ("o", 4.0), ("o", 12.0), ("D", 5.0)}
    assert shown["*", 6.0] == pytest.approx((96.875, 0.884 / 2**0.5))
    assert shown["o", 12.0] == pytest.approx((96.25, 0.354 / 2**0.5))
    assert [text.get_text() for text in panel.texts] == ["searched, weight 0.1", "weight 0.5"]
    assert panel.get_xlabel() == "cost (onnx) in ms"
    (steps,) = (line for line in panel.get_lines() if line.get_drawstyle() == "steps-post")
    assert list(steps.get_xdata()) == pytest.approx([4.0, 5.0])
    assert list(steps.get_ydata()) == [95.125, 96.875]


def test_costs_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    own = results(tmp_path / "own", costs={"searched": 0.006})
    assert len(front_figure(own, []).axes[0].containers) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": "counted"}, "costs on counted in seconds"),
        ({"costs": {}}, "no searched network"),
    ],
)
def test_runs_that_do_not_compare_are_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    own = results(tmp_path / "own")
    with pytest.raises(UserError, match=named):
        front_figure(own, [results(tmp_path / "other", **change)])
    foreign = results(tmp_path / "foreign")
    foreign.architecture.backbone.name = "resnet18"
    with pytest.raises(UserError, match="another network"):
        front_figure(own, [foreign])


def test_no_front_is_drawn_of_a_run_without_costs(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path / "run", evaluation()))
    assert FRONT not in draw(run)
    assert "cost" not in Page(report_page(load_results(run), {})).rows[0]
    with pytest.raises(UserError, match="has not been evaluated with costs"):
        draw(run, [results(tmp_path / "other")])


def test_the_page_tells_what_networks_cost(tmp_path: Path) -> None:
    found = results(tmp_path / "run")
    page = Page(report_page(found, {FRONT: b"\x89PNG front"}))
    assert page.rows[0][4] == "cost (onnx)"
    rows = {row[0]: row for row in page.rows}
    assert rows["searched"][4] == "6 ms (1.20)" and rows["without enhancers"][4] == "4 ms (0.80)"
    assert "By the cost table (onnx) it takes 6 ms, 1.20 times as much" in page.text
    assert "Accuracy against cost" in page.text and len(page.sources) == 1


def test_expected_costs_are_read_and_drawn(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path / "run"))
    rows = [(*row, 1.5 - 0.1 * i, 0.2 * i) for i, row in enumerate(SEARCH)]
    run.write("metrics.csv", table([*HEAD, "expected_cost", "cost_weight"], rows))
    found = load_results(run)
    assert [row.expected_cost for row in found.search] == pytest.approx([1.5, 1.4, 1.3, 1.2])
    found.config.search.cost.file = "costs.json"
    run.write("config.yaml", to_yaml(found.config))
    assert "cost_over_epochs.png" in draw(run)
    page = (run / "report.html").read_text()
    assert "Expected cost" in page and "weight 0, no budget, from costs.json" in page


@pytest.mark.costly
def test_from_the_search_to_the_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = shallow_table(tmp_path, FIRST_DEAR, SECOND_DEAR)
    controls = ["none", "skip", "random", "fixed:max_pool_3x3", "fixed:max_pool_5x5"]
    for name, weight in (("noted", 0.0), ("cheap", 20.0)):
        changes = SHALLOW | {"search__cost__file": file, "search__cost__weight": weight}
        changes |= {"adapt__controls": controls, "adapt__epochs": 1}
        for command in ("search", "adapt", "evaluate"):
            assert main([command, *options(tmp_path / name, **changes)]) == 0
    out = capsys.readouterr().out
    assert "cost (by hand)" in out and "1.75 joules (1.75)" in out
    found = json.loads((tmp_path / "noted" / "evaluation.json").read_text())
    costs = {name: entry["seeds"]["0"]["cost"] for name, entry in found["networks"].items()}
    assert costs["none"] == 0.9 and costs["skip"] == 1
    assert costs["fixed:max_pool_3x3"] == 1.75 and costs["fixed:max_pool_5x5"] is None
    cheap = json.loads((tmp_path / "cheap" / "evaluation.json").read_text())
    assert cheap["networks"]["searched"]["seeds"]["0"]["cost"] < costs["searched"]
    picture = (tmp_path / "noted" / FRONT).read_bytes()
    file.unlink()  # each run keeps its own
    call = ["plot", "--output", str(tmp_path / "noted"), "--beside", str(tmp_path / "cheap")]
    assert main(call) == 0
    assert (tmp_path / "noted" / FRONT).read_bytes() != picture
    assert main(["evaluate", "--config", str(tmp_path / "noted" / "config.yaml")]) == 0
