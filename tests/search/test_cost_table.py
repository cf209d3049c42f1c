"""Cost tables: what is refused, what a network costs by one, and what is counted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metapool_kernels.devices import registry, run
from metapool_kernels.devices.latency import Latency
from metapool_kernels.search.cli import main
from metapool_kernels.search.commands import cost
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.counting import count
from metapool_kernels.search.run.controls import network_cost
from metapool_kernels.search.run.cost_table import FORMAT, CostTable, LayerCost, amount
from metapool_kernels.search.settings.config import ModelConfig
from tests.search.run_by_hand import CANDIDATES, LAYERS, architecture
from tests.search.runs import CONFIG, SHALLOW, options


def table(**changes: Any) -> CostTable:
    """Of the run by hand: in each layer another cost, a maximum twice an average."""
    layers = [
        LayerCost(name, 48, (8, 8), {"max_pool_3x3": 2.0 * (i + 1), "avg_pool_3x3": 1.0 * (i + 1)})
        for i, name in enumerate(LAYERS)
    ]
    made = CostTable("bench", "seconds", architecture().backbone, 100.0, layers, none=90.0)
    return replace(made, **changes)


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text(FORMAT.to_json(table()))
    assert FORMAT.load(tmp_path / "cost.json") == table()


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "negative": (lambda t: t["layers"][0]["costs"].update(max_pool_3x3=-1.0), "costs -1.0"),
    "not a number": (lambda t: t["layers"][0]["costs"].update(max_pool_3x3=float("nan")), "NaN"),
    "infinite": (lambda t: t["layers"][1]["costs"].update(max_pool_3x3=float("inf")), "Infinity"),
    "a word": (lambda t: t["layers"][0]["costs"].update(max_pool_3x3="much"), "much"),
    "whole network for nothing": (lambda t: t.update(skip=0), "should be positive"),
    "none negative": (lambda t: t.update(none=-2.0), "a whole network costs -2.0"),
    "skip_connect with a cost": (
        lambda t: t["layers"][2]["costs"].update(skip_connect=1.0), "beyond skip_connect"),
    "layer twice": (lambda t: t["layers"].append(t["layers"][0]), "different names"),
    "another format": (lambda t: t.update(format="metapool-architecture"), "not a cost table"),
    "newer": (lambda t: t.update(format_version=2), "format version 2"),
    "lacks a field": (lambda t: t.pop("unit"), "unit"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_is_refused_in_one_line(wrong: str, tmp_path: Path) -> None:
    change, named = WRONG[wrong]
    content = json.loads(FORMAT.to_json(table()))
    change(content)
    (tmp_path / "cost.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        FORMAT.load(tmp_path / "cost.json")
    assert named in str(caught.value) and "cost.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": table().layers[1:]}, "lacks layer 'blocks.1.0.bn2'"),
        ({"layers": [replace(layer, channels=8) for layer in table().layers]}, "48 channels"),
        ({"layers": [replace(layer, map_size=(8, 4)) for layer in table().layers]}, "maps of 8x8"),
        (
            {"layers": [replace(layer, costs={"max_pool_3x3": 1.0}) for layer in table().layers]},
            "lacks avg_pool_3x3",
        ),
        (
            {"backbone": replace(table().backbone, image_shape=(3, 64, 64))},
            "another network (image_shape [3, 64, 64] for [1, 32, 32])",
        ),
    ],
)
def test_a_table_of_something_else_is_refused(change: dict[str, Any], named: str) -> None:
    found = architecture()
    with pytest.raises(UserError) as caught:
        table(**change).fitted("search.cost.file", found.backbone, found.layers, CANDIDATES)
    assert str(caught.value).startswith("search.cost.file") and named in str(caught.value)


def test_layers_come_in_the_order_of_the_network() -> None:
    found = architecture()
    mixed = table(layers=table().layers[::-1])
    fitted = mixed.fitted("it", found.backbone, found.layers, CANDIDATES)
    assert fitted == table()
    assert fitted.relative(CANDIDATES)[LAYERS[1]] == [0.0, 0.04, 0.02]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        # avg in the first layer, max in the second, skip_connect and avg in the third
        ("searched", 100 + 1 + 4 + 0 + 3),
        ("none", 90),
        ("skip", 100),
        ("uniform", 100 + 3 + 6 + 9),
        ("fixed:max_pool_3x3", 100 + 2 + 4 + 6),
        ("fixed:max_pool_9x9", None),
    ],
)
def test_what_networks_cost(network: str, expected: float | None) -> None:
    assert network_cost(network, architecture(), 0, table()) == expected


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (3.21e-3, "seconds", "3.21 ms"),
        (5.5e-5, "seconds", "55 µs"),
        (0.0, "seconds", "0 s"),
        (12_544.0, "MACs", "12.5 k MACs"),
        (300.0, "bytes", "300 bytes"),
    ],
)
def test_amounts_in_words(number: float, unit: str, text: str) -> None:
    assert amount(number, unit) == text


def test_counts_by_hand() -> None:
    """Two channels of 4 x 4 maps, 32 outputs; the convolutions around have 9 and 8 for each."""
    found = {
        name: count(cost.surrounded(name, 2, ModelConfig()), (2, 4, 4))
        for name in ("skip_connect", "max_pool_3x3", "avg_pool_7x7", "max_pool_1x5")
    }
    skip = found["skip_connect"]
    assert skip.macs == 32 * 9 + 32 * 8
    beyond = {name: counts.macs - skip.macs for name, counts in found.items()}
    # Strips: 2 + 2 comparisons, 6 + 6 additions, 4 comparisons.
    assert beyond == {
        "skip_connect": 0,
        "max_pool_3x3": 32 * 4,
        "avg_pool_7x7": 32 * 12,
        "max_pool_1x5": 32 * 4,
    }
    # A map of 128 bytes is read and written, by each of two strips where there are two.
    moved = {name: counts.bytes - skip.bytes for name, counts in found.items()}
    assert moved["max_pool_3x3"] == moved["max_pool_1x5"] == 256
    assert moved["avg_pool_7x7"] == 512


def test_weights_of_extra_candidates_count() -> None:
    """Coordinate attention: C to 8 channels on 4 + 4 places, then 8 to C on 4 places, twice.

    Before that, averages of four numbers in 4 + 4 places of each channel.
    """
    found = count(cost.surrounded("coordinate_attention", 2, ModelConfig()), (2, 4, 4))
    skip = count(cost.surrounded("skip_connect", 2, ModelConfig()), (2, 4, 4))
    assert found.macs - skip.macs == 8 * 2 * 8 + 2 * 4 * 8 * 2 + 2 * 8 * 3


def fake_seconds(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str], float]) -> list[str]:
    """Runtimes that are always there, and take the time that is asked for."""
    measured: list[str] = []

    def measure(target: str, networks: Any, shapes: Any, *, samples: int) -> dict[str, Latency]:
        assert target == "onnx" and networks.keys() == shapes.keys()
        for name, network in networks.items():
            assert network(torch.zeros(1, *shapes[name])).dim() == 2
        measured.extend(networks)
        return {name: Latency(*[seconds(name)] * 3) for name in networks}

    monkeypatch.setattr(run, "check_installed", lambda name: None)
    monkeypatch.setattr(run, "measure_networks", measure)
    return measured


def test_costs_are_what_comes_beyond_skip_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds(name: str) -> float:
        if name in ("skip", "in turn", "none"):
            return {"skip": 2.0, "in turn": 2.5, "none": 1.5}[name]
        # An average comes out faster than nothing, as noise would have it.
        return 0.5 + {"max_": 0.25, "avg_": -0.1, "skip": 0.0}[name[:4]]

    measured = fake_seconds(monkeypatch, seconds)
    arguments = options(tmp_path / "run", **SHALLOW)
    assert main(["cost", *arguments, "--target", "onnxruntime"]) == 0
    # Both layers have maps of the same size: three candidates once, and three whole networks.
    assert len(measured) == 6
    path = tmp_path / "run.cost.json"
    assert not (tmp_path / "run").exists()
    found = FORMAT.load(path)
    assert (found.target, found.unit, found.skip, found.none) == ("onnxruntime", "seconds", 2, 1.5)
    costs = {"skip_connect": 0.0, "max_pool_3x3": 0.25, "avg_pool_3x3": 0.0}
    assert [layer.costs for layer in found.layers] == [costs] * 2
    (probe,) = found.probes
    assert probe.choices == ["skip_connect", "max_pool_3x3"]
    assert (probe.cost, probe.sum) == (2.5, 2.25)
    out = capsys.readouterr().out
    assert "measured" not in out and "2.5 s, by the table 2.25 s (-10%)" in out
    assert str(path) in out and "search.cost.file" in out
    # Another measurement takes its place; what is no table does not.
    assert main(["cost", *arguments, "--target", "counted"]) == 0
    assert FORMAT.load(path).unit == "MACs"
    path.write_text("precious")
    assert main(["cost", *arguments, "--target", "counted"]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert path.read_text() == "precious"


def test_a_file_that_cannot_be_written_is_noticed_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cost, "make_table", lambda *_: pytest.fail("measured"))
    arguments = ["--config", str(CONFIG), "--target", "counted"]
    assert main(["cost", *arguments, "--file", str(tmp_path / "file" / "cost.json")]) == 2
    assert "cannot write into" in capsys.readouterr().err


def test_candidates_of_controls_are_measured_too(tmp_path: Path) -> None:
    changes = SHALLOW | {"adapt__controls": ["none", "random", "fixed:max_pool_5x5"]}
    file = tmp_path / "costs.json"
    call = ["cost", *options(tmp_path / "run", **changes), "--target=counted-bytes"]
    assert main([*call, f"--file={file}"]) == 0
    found = FORMAT.load(file)
    assert found.unit == "bytes"
    assert list(found.layers[0].costs)[-1] == "max_pool_5x5"
    # Counted, a network is the sum of its parts.
    assert all(probe.cost == probe.sum for probe in found.probes)


@pytest.mark.parametrize(
    ("target", "named"),
    [("abacus", "there is no target 'abacus'"), ("onnx", "metapool_kernels[export]")],
)
def test_a_target_that_is_not_there(
    target: str,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "missing_packages", lambda of: ["somewhere"])
    assert main(["cost", *options(tmp_path / "run"), "--target", target]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and "counted" in line
    assert not list(tmp_path.iterdir())


def test_a_busy_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cost._spread_warnings([0.1, 0.15, 0.9]) == []
    (line,) = cost._spread_warnings([0.1, 0.5, 0.9])
    assert "50% of the median" in line


@pytest.mark.costly
def test_seconds_in_a_real_runtime(tmp_path: Path) -> None:
    """Times are no test; that a window of 15 x 15 is dearer than nothing is plain."""
    for package in registry.load_target("onnx").packages:
        pytest.importorskip(package)
    changes = SHALLOW | {
        "data__image_size": 64,
        "model__candidates": ["skip_connect", "max_pool_15x15"],
    }
    file = tmp_path / "costs.json"
    call = ["cost", *options(tmp_path / "run", **changes), "--target=onnxruntime"]
    assert main([*call, f"--file={file}"]) == 0
    found = FORMAT.load(file)
    assert found.skip > 0 and found.none is not None and found.none > 0
    assert found.versions.keys() >= {"onnxruntime", "torch"}
    assert all(layer.costs["max_pool_15x15"] > 0 for layer in found.layers)
