"""The folder of a finished run, written by hand: every number in it is known."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metapool_kernels.search.networks.architecture import Architecture, Layer, to_json
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.settings.config_file import to_yaml

CANDIDATES = ["skip_connect", "max_pool_3x3", "avg_pool_3x3"]
LAYERS = ["blocks.1.0.bn2", "blocks.1.1.bn2", "blocks.2.0.bn2"]
# Probabilities of 0.1, 0.2 and 0.7 in different orders.
ALPHAS = [[math.log(p) for p in row] for row in ([0.1, 0.2, 0.7], [0.2, 0.7, 0.1], [0.7, 0.1, 0.2])]
EPOCHS = [2, 3, 4]

SEARCH = [
    # epoch, loss, accuracy, alpha_loss, alpha_accuracy, lr, seconds, step_ms, stopped
    (1, 2.25, 15.5, None, None, 0.05, 9.5, 12.5, 0),
    (2, 1.75, 35.5, 1.875, 31.5, 0.04, 9.5, 40.5, 1),
    (3, 1.25, 55.5, 1.375, 51.5, 0.03, 8.5, 31.25, 2),
    (4, 0.75, 75.5, 0.875, 71.5, 0.02, 7.5, 22.125, 3),
]
HEAD = ["epoch", "loss", "accuracy", "alpha_loss", "alpha_accuracy", "lr", "seconds"]
HEAD += ["step_ms", "stopped"]

NETWORKS: dict[str, dict[str, Any]] = {
    "searched": {"parameters": 123456, "accuracies": [97.5, 96.25], "mean": 96.875, "std": 0.884},
    "none": {"parameters": 111222, "accuracies": [95.5, 94.75], "mean": 95.125, "std": 0.53},
    "uniform": {"parameters": 133444, "accuracies": [96.5, 96.0], "mean": 96.25, "std": 0.354},
}


def architecture() -> Architecture:
    """Three layers of a small MobileNetV2; the last keeps two candidates."""
    choices = [["avg_pool_3x3"], ["max_pool_3x3"], ["skip_connect", "avg_pool_3x3"]]
    return Architecture(
        backbone=Backbone(
            "mobilenetv2_035",
            {"output_stride": 4, "num_classes": 10, "in_chans": 1},
            False,
            (1, 32, 32),
        ),
        insert_after=r"blocks\.1\.\d+\.bn2|blocks\.2\.0\.bn2",
        candidates=CANDIDATES,
        count_include_pad=True,
        layers=[
            Layer(
                name=LAYERS[i],
                channels=48,
                map_size=(8, 8),
                choice=choices[i],
                weights=[1.0] if len(choices[i]) == 1 else [0.75, 0.25],
                alpha=ALPHAS[i],
                probability=0.6875 + i / 100,
                margin=0.4375 + i / 100,
                epoch=EPOCHS[i],
                reason="margin" if i < 2 else "deadline",
            )
            for i in range(3)
        ],
        seed=3,
        versions={"metapool_kernels": "1.2.3", "torch": "2.99"},
    )


def trajectory() -> list[dict[str, list[float]]]:
    """Equal at the start and after the warm-up; then half way, then where each layer stopped."""
    equal = [1 / 3, 1 / 3, 1 / 3]
    half = [0.25, 0.375, 0.375]
    return [
        dict.fromkeys(LAYERS, equal),
        dict.fromkeys(LAYERS, equal),
        dict.fromkeys(LAYERS, half),
        dict.fromkeys(LAYERS[1:], half),
        {LAYERS[2]: [0.7, 0.1, 0.2]},
    ]


def evaluation() -> dict[str, Any]:
    """As ``metapool evaluate`` writes it."""
    networks = {
        name: {
            "start": "scratch",
            "epochs": 8,
            "parameters": numbers["parameters"],
            "seeds": {
                str(seed): {"correct": round(4 * accuracy), "accuracy": accuracy, "loss": 0.125}
                for seed, accuracy in enumerate(numbers["accuracies"])
            },
            "mean": numbers["mean"],
            "std": numbers["std"],
        }
        for name, numbers in NETWORKS.items()
    }
    return {"images": 400, "networks": networks}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """As :meth:`RunFolder.write_metrics` writes it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def write_run(folder: Path, evaluated: Mapping[str, Any] | None = None) -> Path:
    """Write the whole folder; with ``evaluated``, that and the networks' training too."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(output=str(folder), seed=3)
    config.model.candidates = CANDIDATES
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "architecture.json").write_text(to_json(architecture()))
    (folder / "metrics.csv").write_text(table(HEAD, SEARCH))
    probabilities = {"layers": LAYERS, "epochs": trajectory()}
    (folder / "probabilities.json").write_text(json.dumps(probabilities))
    if evaluated is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluated))
        for name in evaluated["networks"]:
            for seed in evaluated["networks"][name]["seeds"]:
                own = folder / "adapt" / name / seed
                own.mkdir(parents=True)
                rows = [(1, 2.0 + int(seed), 20, 0.05, 1.5), (2, 1.0 + int(seed), 60, 0.0, 1.5)]
                text = table(("epoch", "loss", "accuracy", "lr", "seconds"), rows)
                (own / "metrics.csv").write_text(text)
    return folder
