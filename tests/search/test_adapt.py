"""Training and measuring what a search has found."""

import copy
import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from metapool_kernels.search.cli import main
from metapool_kernels.search.commands import evaluate
from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.networks.derive import derive
from metapool_kernels.search.run.controls import build_network, random_choices, uniform_mixture
from metapool_kernels.search.run.run_folder import RunFolder
from metapool_kernels.search.settings.config_file import load_config
from metapool_kernels.search.training import plain_training
from tests.search.runs import DROPOUT, SHALLOW, metrics
from tests.search.runs import options as options_of

pytestmark = pytest.mark.usefixtures("quick_pictures")

BOTH = ["none", "random"]
"""The controls that have to be there."""
ALL = ["none", "skip", "random", "uniform"]


def options(folder: Path, **changes: Any) -> list[str]:
    """Of a shallow network, which trains in a moment, and all controls."""
    defaults = {"model__name": DROPOUT, "adapt__epochs": 1, "adapt__controls": ALL}
    return options_of(folder, **SHALLOW | defaults | changes)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shallow") / "run"
    assert main(["search", *options(folder)]) == 0
    return folder


@pytest.fixture
def searched(shallow: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(shallow, folder)
    return folder


@pytest.mark.costly
def test_all_networks_are_trained_and_measured(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(searched, adapt__seeds=2)
    assert main(["adapt", *arguments]) == 0
    assert main(["evaluate", *arguments]) == 0
    results = json.loads((searched / "evaluation.json").read_text())
    networks = results["networks"]
    assert list(networks) == ["searched", "none", "skip", "random", "uniform"]
    assert results["images"] == 1708
    lines = capsys.readouterr().out.splitlines()
    for name, entry in networks.items():
        accuracies = [result["accuracy"] for result in entry["seeds"].values()]
        assert list(entry["seeds"]) == ["0", "1"]
        for result in entry["seeds"].values():
            assert result["accuracy"] == pytest.approx(100 * result["correct"] / 1708)
        assert entry["mean"] == pytest.approx(sum(accuracies) / 2)
        assert entry["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert f"{entry['mean']:.2f}% ± {entry['std']:.2f}" in line
        for seed in entry["seeds"]:
            assert [row["epoch"] for row in metrics(searched / "adapt" / name / seed)] == ["1"]
    # Fewer parameters than with enhancers, and as many whatever these do.
    sizes = [entry["parameters"] for entry in networks.values()]
    assert sizes[1] < sizes[0] == sizes[2] == sizes[3] == sizes[4]


def test_adapting_sees_every_training_image_and_no_other(
    searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bytes] = set()
    weight_step = plain_training.weight_step

    def noting(accelerator: Any, model: Any, batches: Any, *rest: Any) -> Any:
        for images, _ in batches:
            seen.update(image.contiguous().numpy().tobytes() for image in images)
        return weight_step(accelerator, model, batches, *rest)

    monkeypatch.setattr(plain_training, "weight_step", noting)
    assert main(["adapt", *options(searched, adapt__controls=BOTH)]) == 0
    split = RunFolder(searched).load_split()
    data = load_data(load_config(searched / "config.yaml"))
    both = [data.train_set[i][0].numpy().tobytes() for i in split.weight + split.alpha]
    assert seen == set(both)


@pytest.mark.costly
def test_side_by_side_the_networks_are_the_same(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(searched, adapt__controls=[*BOTH, "fixed:max_pool_5x5"])
    assert main(["adapt", *arguments]) == 0
    one_by_one = {path: path.read_bytes() for path in searched.glob("adapt/*/0/*.safetensors")}
    assert {path.parts[-3] for path in one_by_one} == {
        *("searched", "none", "random", "fixed-max_pool_5x5")
    }
    assert main(["adapt", *arguments, "--overwrite", "--jobs=2"]) == 0
    assert {path: path.read_bytes() for path in one_by_one} == one_by_one
    assert main(["evaluate", *arguments]) == 0
    assert "max_pool_5x5 everywhere" in capsys.readouterr().out
    assert main(["adapt", *arguments, "--overwrite", "--jobs=0"]) == 2


@pytest.mark.parametrize(
    "controls, said",
    [
        (["none", "random", "fixed:max_pool_4x4"], "max_pool_4x4"),
        (["none", "random", "fixed:"], "adapt.controls"),
        (["none", "random", "mean"], "adapt.controls"),
        (["none", "skip"], "lacks random"),
    ],
)
def test_unfit_controls_are_refused_and_nothing_is_lost(
    searched: Path, controls: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", *options(searched, adapt__controls=controls)]) == 2
    assert said in capsys.readouterr().err
    assert not (searched / "adapt").exists()


def test_controls_differ_in_their_poolings_alone(finished: Path) -> None:
    architecture = load_architecture(finished / "architecture.json")
    assert random_choices(architecture, 0) == random_choices(architecture, 0)
    assert random_choices(architecture, 0) != random_choices(architecture, 1)
    drawn = [
        layer.choice for seed in range(100) for layer in random_choices(architecture, seed).layers
    ]
    for candidate in architecture.candidates:
        assert drawn.count([candidate]) / len(drawn) == pytest.approx(1 / 3, abs=0.05)
    uniform = uniform_mixture(architecture)
    images = torch.randn(2, 1, 16, 16)
    for layer in uniform.layers:
        assert layer.choice == architecture.candidates
    with torch.no_grad():
        outputs = [
            build_network(name, architecture, seed=0).eval()(images)
            for name in ("searched", "none", "skip", "random", "uniform", "fixed:avg_pool_5x5")
        ]
        assert torch.equal(build_network("random", architecture, 0).eval()(images), outputs[3])
    for i in range(len(outputs)):
        assert not any(torch.allclose(outputs[i], other) for other in outputs[:i])


@pytest.mark.costly
def test_averaged_weights_are_those_that_count(searched: Path) -> None:
    assert main(["adapt", *options(searched, adapt__ema=0.5, adapt__controls=BOTH)]) == 0
    folder = searched / "adapt" / "searched" / "0"
    averaged = load_file(folder / "weights.safetensors")
    checkpoint = RunFolder(folder).load_checkpoint()
    assert checkpoint is not None
    for name, tensor in averaged.items():
        assert torch.equal(tensor, checkpoint.weights[f"ema.{name}"])
    begun = build_network("searched", load_architecture(searched / "architecture.json"), 0)
    for other in (checkpoint.weights, begun.state_dict()):
        assert not torch.equal(averaged["stem.0.weight"], other["stem.0.weight"])
    assert main(["evaluate", *options(searched, adapt__ema=0.5, adapt__controls=BOTH)]) == 0
    assert list(json.loads((searched / "evaluation.json").read_text())["networks"]) == [
        *("searched", "none", "random")
    ]


@pytest.mark.costly
def test_trained_networks_are_not_replaced_unless_asked_for(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(searched, search__epochs=99)
    assert main(["adapt", *arguments]) == 0
    weights = searched / "adapt" / "none" / "0" / "weights.safetensors"
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


@pytest.mark.costly
@pytest.mark.parametrize("finished_epochs", [2, 5], ids=["searched", "none"])
def test_an_interrupted_training_goes_on_with_the_same_numbers(
    searched: Path,
    finished_epochs: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = options(searched, adapt__epochs=3, adapt__ema=0.5, adapt__controls=BOTH)
    assert main(["adapt", *arguments]) == 0
    whole = searched / "whole"
    (searched / "adapt").rename(whole)

    train_epoch = plain_training.Training._train_epoch
    calls = count()

    def interrupted(self: plain_training.Training, bar: Any) -> dict[str, Any]:
        if next(calls) == finished_epochs:
            raise KeyboardInterrupt
        return train_epoch(self, bar)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(plain_training.Training, "_train_epoch", interrupted)
        assert main(["adapt", *arguments]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"metapool adapt --config {searched}/adapt/config.yaml --resume")
    assert main(["adapt", *arguments, "--resume"]) == 0
    for name in ("searched/0", "none/0"):
        one, other = whole / name, searched / "adapt" / name
        assert metrics(one) == metrics(other)
        first, second = (load_file(folder / "weights.safetensors") for folder in (one, other))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_searched_weights_begin_with_recalibrated_batch_norm(searched: Path) -> None:
    """A learning rate of almost nothing leaves what training has begun with."""
    changes = {"adapt__weights__lr": 1e-12, "adapt__controls": BOTH}
    arguments = options(searched, adapt__start="searched", **changes)
    supernet = RunFolder(searched).load_weights()
    assert main(["adapt", *arguments]) == 0
    adapted = RunFolder(searched / "adapt" / "searched" / "0").load_weights()
    name = "blocks.1.depthwise.host.1"
    torch.testing.assert_close(adapted[f"{name}.weight"], supernet[f"{name}.weight"])
    # Averages over all 89 images, and then one epoch's worth of the usual moving average.
    data = load_data(load_config(searched / "config.yaml"))
    split = RunFolder(searched).load_split()
    images = torch.stack([data.train_set[i][0] for i in sorted(split.weight + split.alpha)])
    model = derive(load_architecture(searched / "architecture.json"), 0, supernet)
    update_bn([images], model)
    expected = model.state_dict()[f"{name}.running_mean"]
    stale = supernet[f"{name}.running_mean"]
    assert (adapted[f"{name}.running_mean"] - expected).norm() < 0.2 * (stale - expected).norm()


def test_the_searched_network_is_also_measured_before_any_training(
    searched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the network that ``adapt.start searched`` begins with, to the bit."""
    arguments = options(searched, adapt__start="searched", adapt__controls=BOTH)
    begun: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    init, measure = plain_training.Training.__init__, evaluate.measure

    def beginning(self: Any, network: Any, *rest: Any) -> None:
        begun.append(copy.deepcopy(network.state_dict()))
        init(self, network, *rest)

    def measuring(network: Any, *rest: Any) -> dict[str, Any]:
        measured.append(copy.deepcopy(network.state_dict()))
        return measure(network, *rest)

    monkeypatch.setattr(plain_training.Training, "__init__", beginning)
    monkeypatch.setattr(evaluate, "measure", measuring)
    assert main(["adapt", *arguments]) == 0
    assert main(["evaluate", *arguments]) == 0
    first, last = begun[0], measured[-1]
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)

    results = json.loads((searched / "evaluation.json").read_text())
    assert list(results["networks"]) == ["searched", *BOTH]
    inherited = results["inherited"]
    assert (inherited["start"], inherited["epochs"]) == ("searched", 0)
    assert inherited["parameters"] == results["networks"]["searched"]["parameters"]
    found = inherited["seeds"]["0"]
    network = derive(load_architecture(searched / "architecture.json"), 0)
    network.load_state_dict(last)
    data = load_data(load_config(searched / "config.yaml"))
    images, targets = data.evaluation_set[data.evaluation]
    with torch.no_grad():
        correct = (network.eval()(images).argmax(1) == targets).sum().item()
    assert abs(found["correct"] - correct) <= 2  # batches of other sizes round
    assert inherited["mean"] == found["accuracy"] == pytest.approx(100 * found["correct"] / 1708)
    assert found["correct"] != results["networks"]["searched"]["seeds"]["0"]["correct"]
    names = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names[names.index("searched") + 1] == "inherited"
    assert f"{found['accuracy']:.2f} %" in (searched / "report.html").read_text()


@pytest.mark.parametrize("missing", ["weights", pytest.param("training", marks=pytest.mark.costly)])
def test_what_is_missing_for_that_is_told_and_the_rest_measured(
    searched: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(searched, adapt__controls=BOTH)
    assert main(["adapt", *arguments]) == 0
    if missing == "weights":
        said = str(searched / "weights.safetensors")
        (searched / "weights.safetensors").unlink()
    else:
        said = "search.train_weights is false"
        own = searched / "config.yaml"
        own.write_text(own.read_text().replace("train_weights: true", "train_weights: false"))
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 0
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "before training" in one]
    assert said in line
    results = json.loads((searched / "evaluation.json").read_text())
    assert list(results["networks"]) == ["searched", *BOTH] and "inherited" not in results


def test_searched_weights_of_another_network_are_refused(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(searched, adapt__controls=BOTH)
    assert main(["adapt", *arguments]) == 0
    other = searched / "adapt" / "none" / "0" / "weights.safetensors"
    shutil.copy(other, searched / "weights.safetensors")
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    assert "do not fit the architecture" in capsys.readouterr().err
    assert not (searched / "evaluation.json").exists()


@pytest.mark.costly
def test_adapting_again_takes_away_what_showed_the_networks_before(searched: Path) -> None:
    arguments = options(searched, adapt__controls=BOTH)
    for command in ("adapt", "evaluate", "export"):
        assert main([command, *arguments]) == 0
    assert "Mean and standard deviation" in (searched / "report.html").read_text()
    assert main(["adapt", *arguments, "--overwrite"]) == 0
    assert not any((searched / name).exists() for name in ("evaluation.json", "controls.png"))
    assert not (searched / "export").exists()
    assert "Mean and standard deviation" not in (searched / "report.html").read_text()


def test_controls_cannot_be_left_out(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", *options(searched, adapt__controls=["uniform"])]) == 2
    assert "lacks none and random" in capsys.readouterr().err
    assert not (searched / "adapt").exists()


def test_every_network_begins_with_the_weights_that_are_given(
    searched: Path, tmp_path: Path
) -> None:
    architecture = load_architecture(searched / "architecture.json")
    given = architecture.backbone.build(seed=7).state_dict()
    RunFolder(tmp_path).write_weights("given.safetensors", given)
    for name in ("searched", "none", "random", "uniform"):
        network = build_network(name, architecture, 0, str(tmp_path / "given.safetensors"))
        stem = network.state_dict()["stem.0.weight"]
        assert torch.equal(stem, given["stem.0.weight"])
        drawn = build_network(name, architecture, 0).state_dict()
        assert not torch.equal(drawn["stem.0.weight"], stem)


@pytest.mark.parametrize("command", ["evaluate", pytest.param("export", marks=pytest.mark.costly)])
def test_weights_of_another_network_are_refused(
    searched: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(searched, adapt__controls=BOTH)
    assert main(["adapt", *arguments]) == 0
    adapted = searched / "adapt"
    other = adapted / "none" / "0" / "weights.safetensors"
    shutil.copy(other, adapted / "searched" / "0" / "weights.safetensors")
    capsys.readouterr()
    assert main([command, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "adapt again" in line


@pytest.mark.parametrize("optimizer", ["adahessian", "no_such_optimizer"])
def test_an_optimizer_that_does_not_work_begins_nothing(
    searched: Path, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(searched.rglob("*"))
    assert main(["adapt", *options(searched, adapt__weights__optimizer=optimizer)]) == 2
    assert optimizer in capsys.readouterr().err
    assert sorted(searched.rglob("*")) == before
