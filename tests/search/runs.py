"""A search small enough for tests, and how to start one in its own process."""

import csv
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "digits.yaml"

SMALL = {
    "data.image_size": 16,
    "data.holdout": 0.95,
    "data.batch_size": 16,
    # Dropout draws from the global generator, whose state a resumed run must bring back.
    "model.arguments": {"output_stride": 4, "drop_rate": 0.2},
    "model.candidates": ["skip_connect", "max_pool_3x3", "avg_pool_3x3"],
    "search.epochs": 12,
    "search.warmup": 0.1,
    "search.alpha.lr": 0.1,
    "search.stop.delta": 0.1,
    "search.stop.ema": 0.5,
    "adapt.epochs": 1,
}
"""Overrides of ``configs/digits.yaml``: 89 images, 3 steps an epoch, 8 epochs to the deadline."""

SHALLOW = {
    "model__name": "metapool_kernels.search.networks.shallow:shallow_net",
    "model__arguments": {"width": 8},
    "model__insert_after": r"blocks\.\d+\.depthwise",
    "search__epochs": 8,
    "search__stop__delta": 0.02,
    "search__stop__ema": 0,
    "adapt__epochs": 3,
    "adapt__controls": ["none", "random"],
}
"""Two layers, of which at least one stops before the last epoch but one."""


DROPOUT = "tests.search.networks:shallow_with_dropout"
"""For ``model.name`` beside SHALLOW."""


def options(output: Path, **changes: Any) -> list[str]:
    """Command line options of a small run; ``changes`` replace dots by two underscores."""
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    settings["output"] = output
    pairs = [f"--{key}={value}" for key, value in settings.items()]
    return ["--config", str(CONFIG), *pairs]


def start(command: str, *arguments: str) -> "subprocess.Popen[str]":
    """Run ``metapool`` in its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "metapool_kernels.search", command, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C is what some tests send, and a shell's background jobs pass on that they ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def metrics(folder: Path) -> list[dict[str, str]]:
    """``metrics.csv`` without the times."""
    with (folder / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name not in ("seconds", "step_ms")}
            for row in csv.DictReader(file)
        ]
