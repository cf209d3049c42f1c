"""Training and measuring what a search has found."""

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metapool_kernels.search import adapt
from metapool_kernels.search.cli import main
from metapool_kernels.search.run_folder import RunFolder
from tests.search.runs import metrics, options


@pytest.fixture
def searched(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def test_both_networks_are_trained_and_measured(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", *options(searched)]) == 0
    assert main(["evaluate", *options(searched)]) == 0
    results = json.loads((searched / "evaluation.json").read_text())
    assert list(results) == ["plain", "enhanced"]
    for result in results.values():
        assert result["images"] == 1708
        assert result["accuracy"] == pytest.approx(100 * result["correct"] / 1708)
    table = capsys.readouterr().out.splitlines()[-2:]
    for line, (name, result) in zip(table, results.items(), strict=True):
        assert line.split()[0] == name
        assert f"{result['accuracy']:.2f}%" in line
    assert [row["epoch"] for row in metrics(searched / "adapt" / "plain")] == ["1"]


def test_trained_networks_are_not_replaced_unless_asked_for(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(searched, search__epochs=99)
    assert main(["adapt", *arguments]) == 0
    weights = searched / "adapt" / "plain" / "weights.safetensors"
    before = weights.read_bytes()
    capsys.readouterr()
    assert main(["adapt", *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert weights.read_bytes() == before
    assert main(["adapt", *arguments, "--adapt.weights.lr=0.5", "--overwrite"]) == 0
    assert weights.read_bytes() != before


@pytest.mark.parametrize("command", ["adapt", "evaluate"])
def test_other_data_than_the_search_had_is_refused(
    searched: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *options(searched, data__holdout=0.5)]) == 2
    assert "data.holdout: 0.95 -> 0.5" in capsys.readouterr().err
    assert not (searched / "adapt").exists()


def test_measuring_before_training_is_refused(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *options(searched)]) == 2
    assert "metapool adapt" in capsys.readouterr().err
    assert not (searched / "evaluation.json").exists()


@pytest.mark.parametrize("finished_epochs", [2, 5], ids=["enhanced", "plain"])
def test_an_interrupted_training_goes_on_with_the_same_numbers(
    searched: Path,
    finished_epochs: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = options(searched, adapt__epochs=3)
    assert main(["adapt", *arguments]) == 0
    whole = searched / "whole"
    (searched / "adapt").rename(whole)

    train_epoch = adapt.Training._train_epoch
    calls = count()

    def interrupted(self: adapt.Training, bar: Any) -> dict[str, Any]:
        if next(calls) == finished_epochs:
            raise KeyboardInterrupt
        return train_epoch(self, bar)

    monkeypatch.setattr(adapt.Training, "_train_epoch", interrupted)
    capsys.readouterr()
    assert main(["adapt", *arguments]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"metapool adapt --config {searched}/adapt/config.yaml --resume")
    monkeypatch.undo()
    assert main(["adapt", *arguments, "--resume"]) == 0
    for name in ("enhanced", "plain"):
        one, other = whole / name, searched / "adapt" / name
        assert metrics(one) == metrics(other)
        first, second = (load_file(folder / "weights.safetensors") for folder in (one, other))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_searched_weights_begin_with_recalibrated_batch_norm(searched: Path) -> None:
    assert main(["adapt", *options(searched, adapt__start="searched")]) == 0
    folder = searched / "adapt" / "enhanced"
    started = float(metrics(folder)[0]["loss"])
    shutil.rmtree(searched / "adapt")
    assert main(["adapt", *options(searched, adapt__start="scratch")]) == 0
    assert started < float(metrics(folder)[0]["loss"])
    assert RunFolder(folder).load_weights()
