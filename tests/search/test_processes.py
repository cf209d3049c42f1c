"""Two processes, over gloo on one machine: the same architecture in both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metapool_kernels.search.architecture import load_architecture
from metapool_kernels.search.cli import main
from tests.search.folders import make_image_folder
from tests.search.runs import REPOSITORY, options

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def launch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*LAUNCH, "-m", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("both")
    # Coordinate attention has weights that vanish when a layer stops without it.
    arguments = options(
        folder / "run",
        search__epochs=6,
        model__extra_candidates=["coordinate_attention"],
        search__alpha__method="fomaml",
        search__alpha__tilt=1.4,
        search__alpha__tasks=2,
    )
    done = launch("tests.search.ranks", str(folder), "search", *arguments)
    assert done.returncode == 0, done.stderr
    told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return folder / "run", told


def test_both_come_to_the_same_network(both: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = both
    assert first["processes"] == second["processes"] == 2
    assert first == second
    assert len(first["stops"]) == 16
    found = load_architecture(folder / "architecture.json")
    assert {layer.name: layer.alpha for layer in found.layers} == first["alphas"]
    assert {layer.name: layer.choice for layer in found.layers} == first["choices"]


def test_an_epoch_is_shared_between_them(both: tuple[Path, list[dict[str, Any]]]) -> None:
    """45 images of the weight half, 16 for each process and step: two steps, not three."""
    folder, (told, _) = both
    weight_half = json.loads((folder / "split.json").read_text())["weight"]
    assert len(weight_half) == 45
    assert told["steps"] == 2


def test_one_process_cannot_go_on_for_two(
    both: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = both
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["search", "--config", str(folder / "config.yaml"), "--resume"]) == 2
    assert "started in 2 processes and cannot go on in 1" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.costly
def test_a_mistake_is_told_once_and_ends_both(tmp_path: Path) -> None:
    done = launch("metapool_kernels.search", "search", *options(tmp_path, model__name="nonet"))
    assert done.returncode != 0
    assert done.stderr.count("metapool:") == 1
    assert "nonet" in done.stderr


@pytest.mark.costly
def test_more_processes_than_images(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", classes=2, train=1, val=1)
    changes = {"data__kind": "folder", "data__root": tmp_path / "images", "data__rgb": True}
    arguments = options(tmp_path / "run", **changes)
    done = launch("metapool_kernels.search", "search", *arguments)
    assert done.returncode != 0
    assert done.stderr.count("metapool:") == 1, done.stderr
    assert "2 processes cannot share 1 images" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.costly
def test_processes_look_at_the_images_together(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", classes=2, train=8, val=2)
    damaged = sorted((tmp_path / "images").rglob("001.*"))
    for image in damaged:
        image.write_bytes(image.read_bytes()[:200])
    changes = {"data__kind": "folder", "data__root": tmp_path / "images", "data__batch_size": 2}
    done = launch("metapool_kernels.search", "search", *options(tmp_path / "run", **changes))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("metapool:")]
    assert "4 images cannot be used" in line
    assert all(str(image) in line for image in damaged)
    assert not (tmp_path / "run").exists()
