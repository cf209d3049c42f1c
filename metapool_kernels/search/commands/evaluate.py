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
from metapool_kernels.search.run.results import INHERITED, Evaluation, Results, load_results
from metapool_kernels.search.run.run_folder import SEARCHED, RunFolder, network_folder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.settings.config_file import load_config
from metapool_kernels.search.training.inherited import inherited_network
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
    trained_with, trained = _trained(searched)
    data = load_inspected(config, accelerator)
    split = searched.load_split()
    split.check(data)
    if accelerator.is_main_process:
        warn(data.warnings)
        if split.differs_in_evaluation(data):
            warn([f"the {len(data.evaluation)} images for evaluation are not those of the search"])
    table = _cost_table(config, searched, architecture)
    entries: dict[str, dict[str, Any]] = {}

    def take(kind: str, name: str, seed: int, network: nn.Module, head: dict[str, Any]) -> None:
        result = measure(network, data, config, accelerator)
        if table is not None:
            result["cost"] = network_cost(name, architecture, seed, table)
        parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        entry = entries.setdefault(kind, {**head, "parameters": parameters, "seeds": {}})
        entry["seeds"][str(seed)] = result

    epochs, start = trained_with.adapt.epochs, trained_with.adapt.start
    for (name, seed), folder in trained.items():
        network = load_network(name, architecture, seed, folder).to(accelerator.device)
        begun = start if name == SEARCHED else "scratch"
        take(name, name, seed, network, {"start": begun, "epochs": epochs})
    missing = _missing_for_inherited(searched)
    if missing is None:
        seed, images = trained_with.seed, sorted(split.weight + split.alpha)
        network = inherited_network(searched, config, data, images, seed, accelerator)
        take(INHERITED, SEARCHED, seed, network, {"start": "searched", "epochs": 0})
    elif accelerator.is_main_process:
        warn([f"no accuracy before training: {missing}"])
    for entry in entries.values():
        accuracies = [result["accuracy"] for result in entry["seeds"].values()]
        entry["mean"] = mean(accuracies)
        entry["std"] = stdev(accuracies) if len(accuracies) > 1 else None
    inherited = entries.pop(INHERITED, None)
    results: dict[str, Any] = {"images": len(data.evaluation), "networks": entries}
    if inherited is not None:
        results[INHERITED] = inherited
    if table is not None:
        results["cost"] = {"target": table.target, "unit": table.unit, "skip": table.skip}

    def finish() -> None:
        searched.write(run_folder.EVALUATION, json.dumps(results, indent=2) + "\n")
        draw(searched)
        _print(load_results(searched))
        print(f"report: {searched / run_folder.REPORT}")

    on_main(finish)


def _trained(searched: RunFolder) -> tuple[Config, dict[tuple[str, int], RunFolder]]:
    """What ``metapool adapt`` was given, and where it has put each network with each seed."""
    adapted = RunFolder(searched / run_folder.ADAPT)
    if not (adapted / run_folder.CONFIG).exists():
        raise UserError(f"nothing is trained in {str(adapted.path)!r}; run 'metapool adapt' first")
    config = load_config(adapted / run_folder.CONFIG)
    seeds = range(config.seed, config.seed + config.adapt.seeds)
    return config, {
        (name, seed): RunFolder(adapted / network_folder(name) / str(seed))
        for name in network_names(config.adapt.controls)
        for seed in seeds
    }


def _missing_for_inherited(searched: RunFolder) -> str | None:
    """Why the search has left no weights to measure, if it has not."""
    own = load_config(searched / run_folder.CONFIG)
    if not own.search.train_weights and own.model.weights is None:
        return "search.train_weights is false and model.weights null, so weights are as drawn"
    weights = searched / run_folder.WEIGHTS
    return None if weights.exists() else f"there is no {str(weights)!r}, which a search ends with"


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
    for name, result in evaluation.rows.items():
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
