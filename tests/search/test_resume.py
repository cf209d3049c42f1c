"""A run that goes on gives the same numbers as one without a break, in every configuration.

And what it computes in is what was asked for, before and after each change of the network.
"""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer

from metapool_kernels.search.cli import main
from metapool_kernels.search.run.run_folder import Checkpoint, RunFolder
from metapool_kernels.search.settings.config import WeightConfig
from metapool_kernels.search.training.optimizers import forget, make_weight_optimizer
from tests.search.runs import SHALLOW, metrics, options

pytestmark = pytest.mark.usefixtures("quick_pictures")

SEARCHES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "float32": {},
    "bf16, fomaml, tasks": {
        "precision": "bf16",
        "search__alpha__method": "fomaml",
        "search__alpha__tilt": 1.4,
        "search__alpha__tasks": 2,
    },
    "bf16, second order": {"precision": "bf16", "search__alpha__method": "second-order"},
    "finite difference": {"search__alpha__method": "finite-difference"},
    "accumulated": {"precision": "bf16", "data__accumulate": 2},
    "warm-up, smoothing, lamb": {
        "search__weights__optimizer": "lamb",
        "search__weights__lr_warmup": 0.5,
        "search__weights__label_smoothing": 0.1,
    },
    "lookahead": {"search__weights__optimizer": "lookahead_adamw"},
    "weights left alone": {"search__train_weights": False, "search__alpha__lr": 0.3},
    "by perturbation": {"search__stop__rule": "perturbation", "search__stop__batches": 2},
    "by ranking": {"search__stop__rule": "stable_ranking"},
    "all open to the deadline": {"search__progressive": False},
    "normalised poolings": {
        "model__candidate_norm": True,
        "search__alpha__method": "second-order",
    },
    "coordinate attention": {"model__extra_candidates": ["coordinate_attention"]},
    "workers": {"data__workers": 1},
}

ADAPTS: dict[str, dict[str, Any]] = {
    "bf16, averaged": {"precision": "bf16", "adapt__ema": 0.5},
    "averaged": {"adapt__ema": 0.5},
    "from the search, bf16": {"precision": "bf16", "adapt__start": "searched"},
    "accumulated": {"precision": "bf16", "data__accumulate": 2},
    "warm-up, smoothing, lookahead": {
        "adapt__weights__optimizer": "lookahead_lamb",
        "adapt__weights__lr_warmup": 0.5,
        "adapt__weights__label_smoothing": 0.1,
    },
}


# Those that are left out want CUDA and libraries of their own.
OPTIMIZERS = [
    *timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*", "adahessian"]),
    *("lookahead_sgd", "lookahead_adamw"),
]
USUAL = ("momentum", "sgd", "adamw", "lamb")


def cases(settings: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(changes, id=name, marks=() if name == "bf16" else pytest.mark.costly)
        for name, changes in settings.items()
    ]


def break_off(epoch: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that is interrupted as soon as ``epoch`` of its first network is saved."""
    save = RunFolder.save_checkpoint

    def interrupted(self: RunFolder, checkpoint: Checkpoint, finished: int) -> None:
        save(self, checkpoint, finished)
        if finished == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save_checkpoint", interrupted)
        assert main(arguments) == 130


def assert_same(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    first, second = (load_file(folder / "weights.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("changes", cases(SEARCHES))
def test_a_search_goes_on_with_the_same_numbers(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["search", *options(whole, **SHALLOW, **changes)]) == 0
    rows = metrics(whole)
    stopped = [int(row["stopped"]) for row in rows]
    # In the middle, and where there is such an epoch after a layer has stopped.
    epoch = next((e for e, count in enumerate(stopped[:-1], 1) if count), 2)
    assert 1 <= epoch < len(rows)
    arguments = ["search", *options(broken, **SHALLOW, **changes)]
    break_off(epoch, arguments, monkeypatch)
    assert main([*arguments, "--resume"]) == 0
    assert_same(whole, broken)
    for name in ("architecture.json", "probabilities.json"):
        assert (whole / name).read_text() == (broken / name).read_text()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shallow") / "run"
    assert main(["search", *options(folder, **SHALLOW)]) == 0
    return folder


@pytest.mark.parametrize("changes", cases(ADAPTS))
def test_a_training_goes_on_with_the_same_numbers(
    searched: Path, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = tmp_path / "whole", tmp_path / "broken"
    for folder in folders:
        shutil.copytree(searched, folder)
    whole, broken = (["adapt", *options(folder, **SHALLOW, **changes)] for folder in folders)
    assert main(whole) == 0
    break_off(2, broken, monkeypatch)
    assert main([*broken, "--resume"]) == 0
    for name in ("searched", "none", "random"):
        one, other = (folder / "adapt" / name / "0" for folder in folders)
        assert_same(one, other)


@pytest.mark.parametrize(
    "extra", [[], pytest.param(["coordinate_attention"], marks=pytest.mark.costly)], ids=str
)
def test_all_that_is_trained_is_computed_in_the_precision_that_is_asked_for(
    extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After stops, in all of the methods' steps, after a break, while adapting."""
    dtypes: list[torch.dtype] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, nn.Conv2d) and module.training and isinstance(output, Tensor):
            dtypes.append(output.dtype)

    changes = {
        "precision": "bf16",
        "search__alpha__method": "second-order",
        "search__stop__rule": "perturbation",
        "search__stop__batches": 2,
        "model__extra_candidates": extra,
        "adapt__start": "searched",
    }
    arguments = options(tmp_path / "run", **SHALLOW, **changes)
    with register_module_forward_hook(note):
        break_off(3, ["search", *arguments], monkeypatch)
        before = len(dtypes)
        assert main(["search", *arguments, "--resume"]) == 0
        searched = len(dtypes)
        assert main(["adapt", *arguments]) == 0
    assert 0 < before < searched < len(dtypes)
    assert set(dtypes) == {torch.bfloat16}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4 * 36, 5))


def drop(model: nn.Sequential, optimizer: Optimizer) -> None:
    """As a layer that stops drops the weights of an extra candidate."""
    weight = model[2].weight
    assert isinstance(weight, nn.Parameter)
    forget(optimizer, weight.requires_grad_(False))


@pytest.mark.filterwarnings("ignore")  # theirs, about themselves
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in USUAL else pytest.mark.costly) for name in OPTIMIZERS],
)
def test_every_optimizer_goes_on_with_the_same_numbers(name: str) -> None:
    """Those that compile themselves do so for a minute, and nothing of that is saved."""
    config = WeightConfig(optimizer=name, lr=0.01, lr_warmup=0.1)
    steps, broken_off = 10, 5
    images, targets = torch.randn(8, 3, 8, 8), torch.arange(8) % 5

    def train(model: nn.Sequential, first: int, saved: dict[str, Any] | None) -> io.BytesIO:
        optimizer, schedule = make_weight_optimizer(list(model.parameters()), config, steps)
        if saved is not None:
            drop(model, optimizer)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        file = io.BytesIO()
        for step in range(first, steps):
            if step == broken_off - 2:
                drop(model, optimizer)
            if step == broken_off and saved is None:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file)
            schedule.step_update(step)
            torch.manual_seed(step)  # some draw numbers
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
        return file

    whole, resumed = network(), network()
    with torch.compiler.set_stance("force_eager"):
        file = train(whole, 0, None)
        train(resumed, broken_off, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert not torch.equal(whole[0].weight, network()[0].weight)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
