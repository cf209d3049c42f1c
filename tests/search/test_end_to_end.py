"""The configurations that need data and a GPU, whole, on small folders of images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metapool_kernels.search.cli import main
from metapool_kernels.search.commands import export
from metapool_kernels.search.networks.architecture import load_architecture
from metapool_kernels.search.run.run_folder import RunFolder
from metapool_kernels.search.settings.config_file import load_config
from tests.search.folders import make_image_folder
from tests.search.runs import REPOSITORY, metrics

LITTLE: dict[str, Any] = {
    "threads": 1,
    "data.kind": "folder",
    "data.workers": 1,
    "data.batch_size": 2,
    "search.epochs": 3,
    "search.warmup": 0.34,
    "adapt.epochs": 1,
    "adapt.controls": ["none", "random"],
}
CONFIGS = {
    "mnist": {"data.accumulate": 2, "data.augment.crop": "resized"},
    "cifar10": {},
    "imagenet": {"data.image_size": 64, "data.accumulate": 2},
}
LAYERS = {"mnist": 2, "cifar10": 16, "imagenet": 16}


@pytest.mark.costly
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "mnist" else pytest.mark.slow) for name in CONFIGS],
)
def test_from_search_to_export(name: str, tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", classes=3, train=4, val=2)
    changes = {
        **LITTLE,
        **CONFIGS[name],
        "data.root": tmp_path / "images",
        "output": tmp_path / "run",
    }
    arguments = [
        "--config",
        str(REPOSITORY / "configs" / f"{name}.yaml"),
        *(f"--{setting}={value}" for setting, value in changes.items()),
    ]
    for command in ("search", "adapt", "evaluate"):
        assert main([command, *arguments]) == 0
    assert main(["export", *arguments, "--target", "onnx,onnx_int8"]) == 0
    assert len(load_architecture(tmp_path / "run" / "architecture.json").layers) == LAYERS[name]
    assert [row["stopped"] for row in metrics(tmp_path / "run")] == ["0", str(LAYERS[name])]
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results["images"] == 6
    assert list(results["networks"]) == ["searched", "none", "random"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "random" in page
    exported = tmp_path / "run" / "export"
    files = {"network.pt2", "network.onnx", "network.int8.onnx", "targets.json"}
    assert {path.name for path in exported.iterdir()} == files
    accuracy = json.loads((exported / "targets.json").read_text())["onnx_int8"]["accuracy"]
    assert accuracy["images"] == 6
    assert accuracy["float32"] == results["networks"]["searched"]["seeds"]["0"]["accuracy"]
    first, second = (
        export._images(load_config(tmp_path / "run" / "config.yaml"), RunFolder(tmp_path / "run"))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second)), "a file of integers is the same each time"
