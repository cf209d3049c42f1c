"""``metapool evaluate``: accuracy of the trained networks on the evaluation split."""

import json
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from metapool_kernels.search.commands.plot import draw
from metapool_kernels.search.data.inspection import load_inspected
from metapool_kernels.search.data.splits import Data, evaluation_batches, image_settings
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.collective import on_main
from metapool_kernels.search.machine.console import format_table, warn
from metapool_kernels.search.machine.processes import make_accelerator
from metapool_kernels.search.networks.architecture import Architecture, load_architecture
from metapool_kernels.search.report.gains import costs, gains, spread_note
from metapool_kernels.search.run import run_folder
from metapool_kernels.search.run.controls import load_network, meaning, network_cost, network_names
from metapool_kernels.search.run.cost_table import FORMAT, CostTable, load_table
from metapool_kernels.search.run.results import Evaluation, Results, load_results
from metapool_kernels.search.run.run_folder import SEARCHED, RunFolder, network_folder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.settings.config_file import load_config
from metapool_kernels.search.training.steps import to_device


def run_evaluate(config: Config) -> None:
    """Measure every trained network, print a table, write ``evaluation.json`` and the pictures.

    Raises:
        UserError: the networks have not been trained, or on other data.
    """
    accelerator = make_accelerator(config)
    searched = RunFolder(config.output)
    architecture = load_architecture(searched / run_folder.ARCHITECTURE)
    searched.check_settings(config, image_settings(config))
    adapted = RunFolder(searched / run_folder.ADAPT)
    if not (adapted / run_folder.CONFIG).exists():
        raise UserError(f"nothing is trained in {str(adapted.path)!r}; run 'metapool adapt' first")
    trained_with = load_config(adapted / run_folder.CONFIG)
    trained = {
        (name, seed): RunFolder(adapted / network_folder(name) / str(seed))
        for name in network_names(trained_with.adapt.controls)
        for seed in range(trained_with.seed, trained_with.seed + trained_with.adapt.seeds)
    }
    data = load_inspected(config, accelerator)
    split = searched.load_split()
    split.check(data)
    if accelerator.is_main_process:
        warn(data.warnings)
        if split.differs_in_evaluation(data):
            warn([f"the {len(data.evaluation)} images for evaluation are not those of the search"])
    table = _cost_table(config, searched, architecture)
    networks: dict[str, dict[str, Any]] = {}
    for (name, seed), folder in trained.items():
        network = load_network(name, architecture, seed, folder).to(accelerator.device)
        entry = networks.setdefault(name, _head(name, network, trained_with))
        entry["seeds"][str(seed)] = measure(network, data, config, accelerator)
        if table is not None:
            entry["seeds"][str(seed)]["cost"] = network_cost(name, architecture, seed, table)
    for entry in networks.values():
        accuracies = [result["accuracy"] for result in entry["seeds"].values()]
        entry["mean"] = mean(accuracies)
        entry["std"] = stdev(accuracies) if len(accuracies) > 1 else None
    results: dict[str, Any] = {"images": len(data.evaluation), "networks": networks}
    if table is not None:
        results["cost"] = {"target": table.target, "unit": table.unit, "skip": table.skip}

    def finish() -> None:
        searched.write(run_folder.EVALUATION, json.dumps(results, indent=2) + "\n")
        draw(searched)
        _print(load_results(searched))
        print(f"report: {searched / run_folder.REPORT}")

    on_main(finish)


def _cost_table(
    config: Config, searched: RunFolder, architecture: Architecture
) -> CostTable | None:
    """That of the search, or another one if the settings name another."""
    own, file = searched / run_folder.COST, config.search.cost.file
    if own.exists() and file in (None, load_config(searched / run_folder.CONFIG).search.cost.file):
        table: CostTable | None = FORMAT.load(own)
    else:
        table = load_table(config.search.cost)
    if table is None:
        return None
    candidates = [*architecture.candidates, *architecture.extra_candidates]
    name = "search.cost.file"
    return table.fitted(name, architecture.backbone, architecture.layers, candidates)


def _print(results: Results) -> None:
    assert results.evaluation is not None
    print(_table(results.evaluation))
    print("\nThe searched network has, in accuracy:")
    for line in gains(results.evaluation):
        print(f"  {line}")
    print(f"{spread_note(results.evaluation)} {costs(results)}")


def _head(name: str, network: nn.Module, config: Config) -> dict[str, Any]:
    return {
        "start": config.adapt.start if name == SEARCHED else "scratch",
        "epochs": config.adapt.epochs,
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "seeds": {},
    }


def measure(
    network: nn.Module, data: Data, config: Config, accelerator: Accelerator
) -> dict[str, Any]:
    """Loss and accuracy of a network on the evaluation split, over all processes."""
    network.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    batches = evaluation_batches(
        data.evaluation_set,
        data.evaluation,
        config.data,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    with torch.inference_mode(), accelerator.autocast():
        for images, targets in to_device(batches, accelerator.device):
            logits = network(images).float()
            loss = F.cross_entropy(logits, targets, reduction="sum")
            total += torch.stack([loss, (logits.argmax(1) == targets).sum()])
    loss_sum, correct = accelerator.reduce(total, reduction="sum").tolist()
    images_seen = len(data.evaluation)
    return {
        "correct": int(correct),
        "accuracy": 100 * correct / images_seen,
        "loss": loss_sum / images_seen,
    }


def _table(evaluation: Evaluation) -> str:
    unit = evaluation.cost
    rows = []
    for name, result in evaluation.networks.items():
        spread = "" if result.std is None else f" ± {result.std:.2f}"
        correct = [str(one.correct) for one in result.seeds.values()]
        rows.append(
            (
                name,
                result.start,
                str(result.epochs),
                f"{result.parameters:,}",
                *([] if unit is None else [unit.text(result.cost)]),
                f"{result.mean:.2f}%{spread}",
                f"{', '.join(correct)} of {evaluation.images}",
                meaning(name),
            )
        )
    cost = () if unit is None else (f"cost ({unit.target})",)
    head = ("network", "start", "epochs", "parameters", *cost, "accuracy", "correct")
    return format_table((*head, "what it shows"), rows)
