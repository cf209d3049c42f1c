"""What breaks in the middle of a run ends it with one line, and what was there stays."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metapool_kernels.search.cli import main
from tests.search.folders import make_image_folder
from tests.search.runs import REPOSITORY, metrics, options
from tests.search.test_search import assert_same_search

pytestmark = pytest.mark.usefixtures("quick_pictures")


def run_with_files_of_at_most(size: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """As on a disk that has room for no more than ``size`` bytes in any one file."""
    return subprocess.run(
        [sys.executable, "-m", "metapool_kernels.search", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def told(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line that says what was wrong."""
    (line,) = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert line.startswith("metapool: ")
    return line


@pytest.mark.costly
def test_a_full_disk_ends_a_search_that_goes_on_later(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # Room for everything but the network's weights.
    done = run_with_files_of_at_most(500_000, "search", *options(folder))
    assert done.returncode == 2
    assert "weights-0001.safetensors" in told(done)
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("weights-*"))
    assert main(["search", "--config", str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_search(finished, folder)


@pytest.mark.costly
def test_a_full_disk_loses_no_finished_epoch(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    died = subprocess.run(
        [sys.executable, "-m", "tests.search.killed", "step:17", "search", *options(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    assert died.returncode < 0
    before = {path: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
    done = run_with_files_of_at_most(500_000, "search", *options(folder), "--resume")
    assert done.returncode == 2 and "weights-0006" in told(done)
    assert {path: path.read_bytes() for path in (folder / "checkpoint").iterdir()} == before
    assert len(metrics(folder)) == 5
    assert main(["search", *options(folder), "--resume"]) == 0
    assert_same_search(finished, folder)


def test_an_empty_class_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "images", classes=2, train=2, val=1)
    (tmp_path / "images" / "train" / "class_7").mkdir()
    changes = {"data__kind": "folder", "data__root": tmp_path / "images"}
    assert main(["search", *options(tmp_path / "run", **changes)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "class_7" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", ["gone", *(pytest.param(c, marks=pytest.mark.costly) for c in ("new", "renamed"))]
)
def test_images_that_have_changed_since_are_noticed(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_image_folder(tmp_path / "images", classes=2, train=8, val=1)
    changes = {"data__kind": "folder", "data__root": tmp_path / "images", "search__epochs": 3}
    arguments = options(tmp_path / "run", **changes, search__warmup=0, data__batch_size=4)
    assert main(["search", *arguments]) == 0
    image = next((tmp_path / "images" / "train" / "class_0").iterdir())
    if change == "gone":
        image.unlink()
    elif change == "new":
        (image.parent / f"0{image.name}").write_bytes(image.read_bytes())
    else:
        image.rename(image.parent / f"0{image.name}")
    for command in (["search", "--resume"], ["adapt"]):
        capsys.readouterr()
        assert main([command[0], *arguments, *command[1:]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "have changed since" in line
    assert not (tmp_path / "run" / "adapt").exists()


def test_a_checkpoint_of_another_version_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(folder)], check=True)
    state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
    del state["trajectory"]
    torch.save(state, folder / "checkpoint" / "state.pt")
    assert main(["search", *options(folder), "--resume"]) == 2
    assert "does not fit this network or this version" in capsys.readouterr().err


@pytest.mark.costly
def test_another_teacher_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        f"--config={REPOSITORY / 'configs' / 'planted.yaml'}",
        f"--output={tmp_path / 'run'}",
        *("--model.weights=teacher", "--search.train_weights=false", "--search.alpha.lr=0.1"),
        *("--data.planted.images=512", "--search.epochs=6", "--adapt.epochs=1"),
    ]
    assert main(["search", *arguments]) == 0
    capsys.readouterr()
    assert main(["adapt", *arguments, "--model.candidates=[skip_connect,avg_pool_3x3]"]) == 2
    assert "model.candidates" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"search__alpha__method": "finite-difference", "precision": "bf16"}, "second-order"),
        ({"data__batch_size": 1, "model__arguments": {}, "data__image_size": 32}, "batches of (1,"),
        ({"model__candidates": [], "model__extra_candidates": ["coordinate_attention"]}, "empty"),
        ({"data__holdout": 0.9999}, "data.holdout"),
        (
            {
                "model__name": "torchvision/resnet18",
                "data__rgb": True,
                "model__arguments": {"weights": "A"},
            },
            "resnet18",
        ),
        ({"search__weights__optimizer": "none"}, "optimizer"),
    ],
    ids=["digits", "batch of one", "no pooling", "one image", "argument", "optimizer"],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *options(tmp_path / "run", **changes)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "run").exists()
