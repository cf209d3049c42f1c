"""What breaks in the middle of a run ends it with one line, and what was there stays."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from metapool_kernels.search.cli import main
from tests.search.folders import make_image_folder
from tests.search.runs import REPOSITORY, metrics, options
from tests.search.test_search import assert_same_search


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


def test_a_full_disk_ends_a_search_that_goes_on_later(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # Room for everything but the network's weights.
    done = run_with_files_of_at_most(500_000, "search", *options(folder))
    assert done.returncode == 2
    assert "weights-0001.safetensors" in told(done)
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("weights-*"))
    assert main(["search", "--config", str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_search(finished, folder)


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


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_image_folder(tmp_path / "images", classes=2, train=16, val=2)
    bad = sorted((tmp_path / "images" / "train" / "class_1").iterdir())[3]
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    arguments = options(
        tmp_path / "run",
        data__kind="folder",
        data__root=tmp_path / "images",
        data__rgb=True,
        data__workers=workers,
        data__batch_size=4,
        search__epochs=6,
    )
    assert main(["search", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("metapool: ") and str(bad) in line
    bad.write_bytes(content)
    assert main(["search", *arguments, "--resume"]) == 0


def test_an_empty_class_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "images", classes=2, train=2, val=1)
    (tmp_path / "images" / "train" / "class_7").mkdir()
    changes = {"data__kind": "folder", "data__root": tmp_path / "images"}
    assert main(["search", *options(tmp_path / "run", **changes)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "class_7" in line
    assert not (tmp_path / "run").exists()


def test_images_that_have_changed_since_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_image_folder(tmp_path / "images", classes=2, train=8, val=1)
    changes = {"data__kind": "folder", "data__root": tmp_path / "images", "search__epochs": 3}
    arguments = options(tmp_path / "run", **changes, search__warmup=0, data__batch_size=4)
    assert main(["search", *arguments]) == 0
    next((tmp_path / "images" / "train" / "class_0").iterdir()).unlink()
    capsys.readouterr()
    assert main(["search", *arguments, "--resume"]) == 2
    assert "split.json" in capsys.readouterr().err
