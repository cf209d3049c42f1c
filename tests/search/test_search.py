"""Whole searches: what they leave, that they repeat, and that they survive being killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metapool_kernels.search.cli import main
from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.run.run_folder import RunFolder
from metapool_kernels.search.settings.config_file import load_config
from metapool_kernels.search.training import loop, upper_level
from tests.search.runs import REPOSITORY, metrics, options, start

pytestmark = pytest.mark.usefixtures("quick_pictures")


def assert_same_search(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    for name in ("architecture.json", "split.json", "probabilities.json"):
        assert (one / name).read_text() == (other / name).read_text()
    first, second = (load_file(folder / "weights.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_finished_search_leaves_a_whole_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.yaml", "split.json", "metrics.csv", "tensorboard", "checkpoint"),
        *("weights.safetensors", "architecture.json", "probabilities.json", "report.html"),
        *("alpha_over_epochs.png", "alpha_heat_map.png", "receptive_field.png"),
        *("step_time.png", "training.png"),
    }
    split = json.loads((finished / "split.json").read_text())
    parts = [set(split[name]) for name in ("weight", "alpha", "evaluation")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797


def test_layers_stop_one_after_the_other_and_all_by_the_deadline(finished: Path) -> None:
    stopped = [int(row["stopped"]) for row in metrics(finished)]
    assert stopped == sorted(stopped)
    assert stopped[0] == 0 and stopped[-1] == 16
    assert len(stopped) <= 8
    layers = load_architecture(finished / "architecture.json").layers
    by_rule = [layer for layer in layers if layer.reason == "margin"]
    assert by_rule
    for layer in by_rule:
        assert layer.margin >= 0.1 and layer.weights == [1.0]
    for layer in layers:
        if layer.reason == "deadline":
            assert (layer.epoch, len(layer.choice)) == (8, 2)


def test_only_weights_are_trained_while_warming_up(finished: Path) -> None:
    assert [row["alpha_loss"] == "" for row in metrics(finished)][:3] == [True, False, False]


def test_each_level_sees_its_own_half_and_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bytes]] = {"train": set(), "alpha": set(), "weight": set()}

    def note(name: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        seen[name] |= {image.contiguous().numpy().tobytes() for image in batch[0]}

    hypergradient, weight_step = upper_level.hypergradient, loop.weight_step

    def noting_hypergradient(
        objective: Any, weights: Any, alphas: Any, *rest: Any, **kw: Any
    ) -> Any:
        note("train", rest[0].keywords["batch"])
        note("alpha", rest[1].keywords["batch"])
        return hypergradient(objective, weights, alphas, *rest, **kw)

    def noting_weight_step(accelerator: Any, model: Any, batches: Any, *rest: Any) -> Any:
        for batch in batches:
            note("weight", batch)
        return weight_step(accelerator, model, batches, *rest)

    monkeypatch.setattr(upper_level, "hypergradient", noting_hypergradient)
    monkeypatch.setattr(loop, "weight_step", noting_weight_step)
    arguments = options(tmp_path / "run", search__epochs=3, search__warmup=0)
    assert main(["search", *arguments]) == 0
    run = RunFolder(tmp_path / "run")
    split, data = run.load_split(), load_data(load_config(run / "config.yaml"))

    def half(indices: list[int]) -> set[bytes]:
        return {data.train_set[i][0].numpy().tobytes() for i in indices}

    assert seen["alpha"] == half(split.alpha)
    assert seen["weight"] == seen["train"] == half(split.weight)


@pytest.mark.costly
def test_the_same_seed_gives_the_same_search(finished: Path, tmp_path: Path) -> None:
    assert main(["search", *options(tmp_path / "again")]) == 0
    assert_same_search(finished, tmp_path / "again")


@pytest.mark.costly
def test_another_seed_gives_another_search(finished: Path, tmp_path: Path) -> None:
    assert main(["search", *options(tmp_path / "other", seed=1)]) == 0
    assert metrics(tmp_path / "other")[0]["loss"] != metrics(finished)[0]["loss"]


def wait_for_a_stopped_layer(process: "subprocess.Popen[str]", folder: Path) -> None:
    while process.poll() is None:
        if (folder / "metrics.csv").exists() and int(metrics(folder)[-1]["stopped"]) > 0:
            return
        time.sleep(0.01)
    pytest.fail(f"the search ended first: {process.communicate()}")


@pytest.mark.parametrize(
    "sent", [pytest.param(signal.SIGKILL, marks=pytest.mark.costly), signal.SIGINT]
)
def test_a_killed_search_goes_on_with_the_same_numbers(
    finished: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = start("search", *options(folder))
    wait_for_a_stopped_layer(process, folder)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    if sent is signal.SIGINT:
        assert process.returncode == 130
        (line,) = [line for line in errors.splitlines() if "warning" not in line]
        assert line.endswith(f"metapool search --config {folder}/config.yaml --resume")
    else:
        assert process.returncode == -signal.SIGKILL
    stopped = int(metrics(folder)[-1]["stopped"])
    assert 0 < stopped < 16
    assert not (folder / "architecture.json").exists()

    assert main(["search", "--config", str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_search(finished, folder)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("moment", "finished_epochs", "stopped"),
    [
        ("step:2", 0, 0),  # in the first epoch
        ("checkpoint:3", 2, 0),  # between the two files of a checkpoint
        ("step:17", 5, None),  # within an epoch, with layers stopped
    ],
)
def test_a_search_that_dies_at_any_moment_goes_on_with_the_same_numbers(
    finished: Path, tmp_path: Path, moment: str, finished_epochs: int, stopped: int | None
) -> None:
    folder = tmp_path / "run"
    died = subprocess.run(
        [sys.executable, "-m", "tests.search.killed", moment, "search", *options(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    rows = metrics(folder) if finished_epochs else []
    assert len(rows) == finished_epochs
    if stopped is None:
        assert 0 < int(rows[-1]["stopped"]) < 16
    assert main(["search", "--config", str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_search(finished, folder)


def test_a_search_that_is_complete_can_be_resumed(finished: Path, tmp_path: Path) -> None:
    """As after a kill between the last epoch and the files that follow it."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(folder)], check=True)
    (folder / "architecture.json").unlink()
    assert main(["search", *options(folder), "--resume"]) == 0
    assert_same_search(finished, folder)


def test_the_package_loads_nothing_of_the_search() -> None:
    code = (
        "import sys, metapool_kernels; "
        "print([m for m in ('metapool_kernels.search', 'timm', 'jsonargparse', 'sklearn', "
        "'matplotlib', 'safetensors', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
