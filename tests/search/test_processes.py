"""Two processes, over gloo on one machine: the same architecture in both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, DistributedType

from metapool_kernels.search.cli import main
from metapool_kernels.search.networks.architecture import load_architecture
from tests.search.folders import make_image_folder
from tests.search.runs import DROPOUT, REPOSITORY, SHALLOW, metrics, options

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


def tell(folder: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """Search in both processes, and return what each has come to."""
    done = launch("tests.search.ranks", str(folder), "search", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("both")
    # Coordinate attention has weights that vanish when a layer stops without it.
    arguments = options(
        folder / "run",
        **SHALLOW | {"model__name": DROPOUT},
        model__extra_candidates=["coordinate_attention"],
        search__alpha__method="fomaml",
        search__alpha__tilt=1.4,
        search__alpha__tasks=2,
    )
    return folder / "run", tell(folder, arguments)


def test_both_come_to_the_same_network(both: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = both
    assert first["processes"] == second["processes"] == 2
    assert first == second
    assert len(first["stops"]) == 2
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
def test_both_keep_the_precision_and_go_on_with_the_same_numbers(tmp_path: Path) -> None:
    """Each stop, and going on, wraps the network anew."""
    changes = SHALLOW | {"precision": "bf16", "data__batch_size": 8}
    told = tell(tmp_path, options(tmp_path / "whole", **changes))
    assert [one["dtypes"] for one in told] == [["torch.bfloat16"]] * 2
    broken = options(tmp_path / "broken", **changes)
    assert launch("tests.search.killed", "checkpoint:3", "search", *broken).returncode != 0
    assert len(metrics(tmp_path / "broken")) == 2
    assert tell(tmp_path, [*broken, "--resume"]) == told
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


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


def test_what_accelerate_launch_can_ask_for_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
        assert main(["search", *options(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ACCELERATE_DYNAMO_BACKEND is EAGER" in line
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        assert main(["search", *options(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot begin as it was launched: DeepSpeed" in line
    with monkeypatch.context() as launched:
        launched.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
        assert main(["search", *options(tmp_path / "run")]) == 2
    assert "by DistributedDataParallel, not FSDP" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
