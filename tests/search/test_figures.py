"""What the pictures show is what the numbers say, and what ``metapool plot`` leaves and refuses."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from metapool_kernels.search.commands.plot import draw, run_plot
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.report.choice_figures import (
    alpha_figure,
    candidate_colors,
    heat_map_figure,
    png,
    receptive_field_figure,
)
from metapool_kernels.search.report.run_figures import (
    controls_figure,
    step_time_figure,
    training_figure,
)
from metapool_kernels.search.run.results import Results, load_results
from metapool_kernels.search.run.run_folder import RunFolder
from metapool_kernels.search.settings.config import Config
from tests.search.run_by_hand import (
    CANDIDATES,
    LAYERS,
    NETWORKS,
    SEARCH,
    architecture,
    evaluation,
    trajectory,
    write_run,
)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return load_results(RunFolder(write_run(tmp_path / "run", evaluation())))


def texts(panel: Axes) -> list[str]:
    return [text.get_text() for text in panel.texts]


def test_a_picture_is_a_png() -> None:
    picture = png(heat_map_figure(architecture()))
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 1000


def test_alpha_has_a_panel_for_each_layer_that_ends_where_it_stopped() -> None:
    figure = alpha_figure(architecture(), trajectory())
    assert len(figure.axes) == 3
    for panel, layer in zip(figure.axes, architecture().layers, strict=True):
        *curves, stop = panel.get_lines()
        assert [line.get_label() for line in curves] == CANDIDATES
        epochs = [epoch[layer.name] for epoch in trajectory() if layer.name in epoch]
        for k, line in enumerate(curves):
            assert list(line.get_ydata()) == [epoch[k] for epoch in epochs]
            assert (line.get_linewidth() > 2) is (CANDIDATES[k] in layer.choice)
        assert list(stop.get_xdata()) == [layer.epoch] * 2
        assert panel.get_title(loc="left") == f"{layer.name}\n{' + '.join(layer.choice)}"


def test_the_last_panel_of_each_column_has_numbers_below() -> None:
    """With six layers, columns three and four end one row higher than the others."""
    found = architecture()
    found.layers = found.layers * 2
    figure = alpha_figure(found, trajectory())
    figure.draw_without_rendering()
    shown = [any(label.get_visible() for label in p.get_xticklabels()) for p in figure.axes]
    assert shown[2:6] == [True] * 4 and not all(shown)


def test_every_candidate_has_its_own_colour() -> None:
    found = architecture()
    found.candidates = ["none", "skip_connect"]
    found.candidates += [f"{kind}_pool_{k}x{k}" for kind in ("max", "avg") for k in range(3, 17, 2)]
    found.extra_candidates = ["coordinate_attention"]
    colors = candidate_colors(found)
    assert list(colors) == [*found.candidates, "coordinate_attention"]
    assert len(set(colors.values())) == len(colors)


def test_the_heat_map_holds_the_softmax_of_alpha_and_frames_the_choices() -> None:
    (panel, _) = heat_map_figure(architecture()).axes
    expected = [[0.1, 0.2, 0.7], [0.2, 0.7, 0.1], [0.7, 0.1, 0.2]]
    np.testing.assert_allclose(panel.images[0].get_array(), expected, rtol=1e-6)
    assert texts(panel) == [f"{value:.2f}" for row in expected for value in row]
    frames = [p for p in panel.patches if isinstance(p, Rectangle)]
    cells = {(round(p.get_y() + 0.42), round(p.get_x() + 0.46)) for p in frames}
    assert cells == {(0, 2), (1, 1), (2, 0), (2, 2)}
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == [f"{name}  (8 x 8)" for name in LAYERS]
    assert [label.get_text() for label in panel.get_xticklabels()] == CANDIDATES


def test_the_heat_map_survives_large_alphas_and_names_candidates_with_weights() -> None:
    found = architecture()
    found.extra_candidates = ["coordinate_attention"]
    for layer in found.layers:
        layer.alpha = [1e4, 0.0, -1e4, 0.0]
    (panel, _) = heat_map_figure(found).axes
    assert panel.images[0].get_array().tolist() == [[1.0, 0.0, 0.0, 0.0]] * 3
    assert [label.get_text() for label in panel.get_xticklabels()][3] == "coordinate_attention"


@pytest.mark.parametrize("square", [True, False])
def test_receptive_fields_are_drawn_for_both_networks(square: bool) -> None:
    heights, widths = [19, 27, 32], [19, 27, 32] if square else [17, 25, 31]
    searched = dict(zip(LAYERS, zip(heights, widths, strict=True), strict=True))
    plain = {name: (11 + i, 11 + i) for i, name in enumerate(LAYERS)}
    figure = receptive_field_figure(architecture(), searched, plain)
    assert len(figure.axes) == (1 if square else 2)
    for panel, sides in zip(figure.axes, (heights, widths), strict=False):
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert list(lines["searched"].get_xdata()) == sides
        assert list(lines["without enhancers"].get_xdata()) == [11, 12, 13]
        assert list(lines["whole image"].get_xdata()) == [32, 32]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[2] == "blocks.2.0.bn2:  skip_connect + avg_pool_3x3"


def test_step_times_are_drawn_over_the_layers_that_were_open(results: Results) -> None:
    panel, behind = step_time_figure(results.search, 3).axes
    warming_up, learning, begin = panel.get_lines()
    assert list(warming_up.get_ydata()) == [12.5]
    assert list(learning.get_xdata()) == [2, 3, 4]
    assert list(learning.get_ydata()) == [40.5, 31.25, 22.125]
    assert list(begin.get_xdata()) == [1.5, 1.5]
    assert [bar.get_height() for bar in behind.patches] == [3, 3, 2, 1]


def test_training_shows_both_halves_and_each_network_over_its_seeds(results: Results) -> None:
    figure = training_figure(results.search, results.training)
    loss, accuracy, later_loss, _ = figure.axes
    for panel, column in ((loss, 1), (accuracy, 2)):
        weight, alpha = panel.get_lines()
        assert list(weight.get_ydata()) == [row[column] for row in SEARCH]
        assert list(alpha.get_xdata()) == [2, 3, 4]
        assert list(alpha.get_ydata()) == [row[column + 2] for row in SEARCH[1:]]
    lines = {line.get_label(): list(line.get_ydata()) for line in later_loss.get_lines()}
    assert lines == {
        "searched": [2.5, 1.5],
        "without enhancers": [2.5, 1.5],
        "uniform mix": [2.5, 1.5],
    }
    assert len(training_figure(results.search, {}).axes) == 2


def test_controls_show_each_seed_the_mean_and_the_spread(results: Results) -> None:
    assert results.evaluation is not None
    (panel,) = controls_figure(results.evaluation).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "searched",
        "without enhancers",
        "uniform mix",
    ]
    assert texts(panel) == ["96.88 ± 0.88 %", "95.12 ± 0.53 %", "96.25 ± 0.35 %"]
    for row, (numbers, bar) in enumerate(zip(NETWORKS.values(), panel.containers, strict=True)):
        seeds = next(line for line in panel.get_lines() if list(line.get_ydata()) == [row, row])
        assert list(seeds.get_xdata()) == numbers["accuracies"]
        mean, _, (spread,) = bar.lines
        assert list(mean.get_xdata()) == [numbers["mean"]]
        ends = spread.get_segments()[0][:, 0]
        np.testing.assert_allclose(np.diff(ends), 2 * numbers["std"])


def test_one_seed_has_no_spread(results: Results) -> None:
    assert results.evaluation is not None
    del results.evaluation.networks["searched"].seeds["1"]
    (panel,) = controls_figure(results.evaluation).axes
    assert texts(panel)[0] == "96.88 %"
    assert [len(bar.lines[2]) for bar in panel.containers] == [0, 1, 1]


def test_colours_of_lines_differ(results: Results) -> None:
    figure = training_figure(results.search, results.training)
    for panel in figure.axes:
        colors = [to_rgb(line.get_color()) for line in panel.get_lines()]
        assert len(set(colors)) == len(colors)


@pytest.mark.parametrize("evaluated", [True, pytest.param(False, marks=pytest.mark.costly)])
def test_the_command_writes_every_picture_and_the_report(
    tmp_path: Path, evaluated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", evaluation() if evaluated else None)
    before = {path.name for path in folder.iterdir()}
    state = torch.get_rng_state()
    started = time.perf_counter()
    run_plot(Config(output=str(folder)))
    assert time.perf_counter() - started < 60
    assert torch.equal(torch.get_rng_state(), state)
    names = ["alpha_over_epochs", "alpha_heat_map", "receptive_field", "step_time", "training"]
    names = [f"{name}.png" for name in names + ["controls"] * evaluated]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(folder / name) for name in [*names, "report.html"]]
    assert {path.name for path in folder.iterdir()} - before == {*names, "report.html"}
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def cut(text: str) -> str:
    return text[: len(text) // 2]


def without_last_digits(text: str) -> str:
    """A line that still has every column, its last number shorter."""
    return text.removesuffix("\n")


def with_line(text: str) -> str:
    return text + "5,0.5\n"


def with_word(text: str) -> str:
    return text.replace("1.75", "high")


def head_alone(text: str) -> str:
    return text.splitlines()[0] + "\n"


def other_layer(text: str) -> str:
    return text.replace("blocks.1.0.bn2", "blocks.9.0.bn2")


def no_distribution(text: str) -> str:
    return json.dumps({"layers": LAYERS, "epochs": [{LAYERS[0]: [0.5, 0.5, 0.5]}]})


def too_short(text: str) -> str:
    content: dict[str, Any] = json.loads(text)
    content["layers"][0]["alpha"] = [0.5]
    return json.dumps(content)


def no_seed(text: str) -> str:
    content: dict[str, Any] = json.loads(text)
    content["networks"]["none"]["seeds"] = {}
    return json.dumps(content)


DAMAGE: list[tuple[str, Callable[[str], str], str]] = [
    ("architecture.json", cut, "not a complete JSON file"),
    ("architecture.json", too_short, "3 architecture parameters"),
    ("probabilities.json", cut, "not a complete JSON file"),
    ("probabilities.json", other_layer, "does not belong to the architecture"),
    ("probabilities.json", no_distribution, "does not belong to the architecture"),
    ("probabilities.json", lambda text: "[]", "not valid"),
    ("metrics.csv", cut, "cut off"),
    ("metrics.csv", without_last_digits, "cut off"),
    ("metrics.csv", with_line, "damaged line"),
    ("metrics.csv", with_word, "damaged line"),
    ("metrics.csv", head_alone, "holds no epoch"),
    ("metrics.csv", lambda text: "epoch,loss\n1,2\n", "no column 'accuracy'"),
    ("metrics.csv", lambda text: "epoch,loss,loss\n1,2,3\n", "2 columns 'loss'"),
    ("adapt/none/1/metrics.csv", cut, "cut off"),
    ("evaluation.json", cut, "not a complete JSON file"),
    ("evaluation.json", lambda text: '{"images": 3}', "not valid"),
    ("evaluation.json", no_seed, "without a seed"),
    ("config.yaml", lambda text: "a: [", "no settings"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_file_is_named_and_nothing_written(
    tmp_path: Path, name: str, damage: Callable[[str], str], message: str
) -> None:
    folder = write_run(tmp_path / "run", evaluation())
    file = folder / name
    file.write_text(damage(file.read_text()))
    before = set(folder.iterdir())
    with pytest.raises(UserError, match=message) as raised:
        draw(RunFolder(folder))
    assert str(file) in str(raised.value)
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("architecture.json", "run 'metapool search' to its end"),
        ("probabilities.json", "No such file"),
        ("metrics.csv", "No such file"),
        ("config.yaml", "no settings"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, message: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(UserError, match=message) as raised:
        run_plot(Config(output=str(folder)))
    assert str(folder / name) in str(raised.value)
