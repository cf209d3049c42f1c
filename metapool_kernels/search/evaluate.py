"""Accuracy of both trained networks on the evaluation split."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from metapool_kernels.search import run_folder
from metapool_kernels.search.architecture import load_architecture
from metapool_kernels.search.config import Config, load_config
from metapool_kernels.search.data import Data, evaluation_batches
from metapool_kernels.search.datasets import load_data
from metapool_kernels.search.derive import derive
from metapool_kernels.search.report import format_table
from metapool_kernels.search.run_folder import ENHANCED, PLAIN, RunFolder


def run_evaluate(config: Config) -> None:
    """Measure both networks, print a table and write ``evaluation.json``.

    Raises:
        UserError: the networks have not been trained, or on other data.
    """
    searched = RunFolder(config.output)
    architecture = load_architecture(searched / run_folder.ARCHITECTURE)
    searched.check_settings(config, ("seed", "data"))
    adapted = RunFolder(searched / run_folder.ADAPT)
    networks = {
        PLAIN: architecture.backbone.build(config.seed),
        ENHANCED: derive(architecture, config.seed),
    }
    for name, model in networks.items():
        model.load_state_dict(RunFolder(adapted / name).load_weights())
    trained_with = load_config(adapted / run_folder.CONFIG).adapt
    data = load_data(config)

    results = {
        name: {
            "start": trained_with.start if name == ENHANCED else "scratch",
            "epochs": trained_with.epochs,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            **measure(model, data, config),
        }
        for name, model in networks.items()
    }
    searched.write(run_folder.EVALUATION, json.dumps(results, indent=2) + "\n")
    print(_table(results))


def measure(model: nn.Module, data: Data, config: Config) -> dict[str, Any]:
    """Loss and accuracy of a network on the evaluation split."""
    model.eval()
    loss, correct = 0.0, 0
    with torch.inference_mode():
        for images, targets in evaluation_batches(
            data.evaluation_set, data.evaluation, config.data
        ):
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            correct += int((logits.argmax(1) == targets).sum())
    images_seen = len(data.evaluation)
    return {
        "images": images_seen,
        "correct": correct,
        "accuracy": 100 * correct / images_seen,
        "loss": loss / images_seen,
    }


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    return format_table(
        ("network", "start", "epochs", "parameters", "accuracy", "correct"),
        [
            (
                name,
                result["start"],
                str(result["epochs"]),
                f"{result['parameters']:,}",
                f"{result['accuracy']:.2f}%",
                f"{result['correct']}/{result['images']}",
            )
            for name, result in results.items()
        ],
    )
