"""``python -m benches.search_cost``: is a network that was searched with costs faster, and as good?

On the problem of ``make search`` (``configs/mnist.yaml``): what candidates cost in onnxruntime is
measured once; then, for each variant and seed, a search, and two trainings of what it has found.
All networks that were found are timed beside each other in onnxruntime, whole. Leaves
``search_cost.json`` and ``.md`` under ``benches/results/``. Fifteen minutes on two cores;
``--quick`` takes one seed.
"""

import argparse
import io
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benches.conditions import conditions
from benches.report import results_folder
from benches.search_epoch import make_config
from benches.tables import table
from metapool_kernels.devices.run import measure_networks
from metapool_kernels.search.commands.adapt import Trainer
from metapool_kernels.search.commands.cost import run_cost
from metapool_kernels.search.commands.evaluate import measure as evaluate
from metapool_kernels.search.commands.search import run_search
from metapool_kernels.search.networks.backbone import make_backbone
from metapool_kernels.search.networks.surgery import find_sites, insert_enhancer
from metapool_kernels.search.report.gains import paired_difference
from metapool_kernels.search.run.controls import load_network
from metapool_kernels.search.run.run_folder import SEARCHED

TARGET = "onnxruntime"
BASE = "no cost"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "weight 0.1": {"search.cost.weight": 0.1},
    "top-1": {"search.stop.keep": "top-1"},
    "top-1, weight 0.1": {"search.stop.keep": "top-1", "search.cost.weight": 0.1},
    "top-1, weight 0.3": {"search.stop.keep": "top-1", "search.cost.weight": 0.3},
}
"""Settings beside those of configs/mnist.yaml, which keep the two best of a layer that is open at
two thirds of the epochs."""

IMAGE_SHAPE = (1, 28, 28)
TRAININGS = 2


class Job(NamedTuple):
    """A search and what comes after it."""

    variant: str
    seed: int
    costs: str
    folder: str


def searched(job: Job) -> dict[str, Any]:
    """Search, train and evaluate: what was found, and its accuracy."""
    run = Path(job.folder, f"{job.variant}, {job.seed}")
    changes = {"search.cost.file": job.costs, "adapt.seeds": TRAININGS, **VARIANTS[job.variant]}
    config = make_config("mnist", {"output": str(run), "seed": job.seed, **changes})
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run_search(config, resume=False, overwrite=False)
        trainer = Trainer(config)
        accuracies = []
        for seed in range(job.seed, job.seed + TRAININGS):
            trainer.train(SEARCHED, seed, quiet=True)
            own = trainer.folder(SEARCHED, seed)
            network = load_network(SEARCHED, trainer.architecture, seed, own)
            result = evaluate(network, trainer.data, config, trainer.accelerator)
            accuracies.append(result["accuracy"])
    layers = trainer.architecture.layers
    return {
        "variant": job.variant,
        "seed": job.seed,
        "choices": ", ".join(" + ".join(sorted(layer.choice)) for layer in layers),
        "accuracy": statistics.fmean(accuracies),
    }


def network(choices: str) -> nn.Module:
    """What a search has found, with weights as drawn and equal shares: its time is the same."""
    config = make_config("mnist", {"output": "none"}).model
    model = make_backbone(config, IMAGE_SHAPE, 10).build(seed=0)
    sites = find_sites(model, config.insert_after, torch.zeros(1, *IMAGE_SHAPE))
    for site, choice in zip(sites, choices.split(", "), strict=True):
        insert_enhancer(model, site.name, site.channels, choice.split(" + "))
    return model.eval()


def times(rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, list[float]]:
    """Milliseconds of each network that was found: median and quartiles."""
    networks = {row["choices"]: network(row["choices"]) for row in rows}
    shapes = dict.fromkeys(networks, IMAGE_SHAPE)
    found = measure_networks(TARGET, networks, shapes, samples=samples)
    return {name: [1e3 * seconds for seconds in latency] for name, latency in found.items()}


def measure(seeds: int, jobs: int) -> dict[str, Any]:
    """The cost table, and a row for each search."""
    with tempfile.TemporaryDirectory() as folder:
        costs = str(Path(folder, "cost.json"))
        run_cost(make_config("mnist", {"output": folder}), target=TARGET, file=costs)
        work = [
            # No two searches of a variant share a training.
            Job(variant, TRAININGS * number, costs, folder)
            for number in range(seeds)
            for variant in VARIANTS
        ]
        rows = []
        with get_context("spawn").Pool(jobs) as pool:
            for row in pool.imap(searched, work):
                print(json.dumps(row), flush=True)
                rows.append(row)
        cost_table = json.loads(Path(costs).read_text())
    return {"cost table": cost_table, "rows": rows}


def markdown(found: Mapping[str, Any]) -> Iterator[str]:
    """The report."""
    yield "# What costs change in a search\n"
    yield "Made by `python -m benches.search_cost`.\n"
    for name, text in found["conditions"].items():
        yield f"- {name}: {text}"
    yield f"\nImages of MNIST (`configs/mnist.yaml`), {TARGET}, one thread, one image. For each"
    yield f"variant and seed a search and {TRAININGS} trainings of its network. Times are those of"
    yield "whole networks, measured beside each other; how many times faster is the geometric mean"
    yield "over the seeds; differences are paired by seed, with their standard error.\n"
    head = ("search", "accuracy", f"more than {BASE}", "ms", "times faster", "choices")
    yield from table(head, (_row(found["rows"], found["milliseconds"], name) for name in VARIANTS))
    yield "\n| network | ms: median | lower quartile | upper quartile |\n|---|---:|---:|---:|"
    for name, numbers in sorted(found["milliseconds"].items(), key=lambda pair: pair[1][0]):
        yield f"| {name} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |"


def _row(
    rows: Sequence[Mapping[str, Any]], milliseconds: Mapping[str, Sequence[float]], variant: str
) -> Sequence[str]:
    own, base = (
        {str(row["seed"]): row for row in rows if row["variant"] == name}
        for name in (variant, BASE)
    )
    accuracies, base_accuracies = (
        {seed: row["accuracy"] for seed, row in each.items()} for each in (own, base)
    )
    difference, error = paired_difference(accuracies, base_accuracies)
    own_times, base_times = (
        {seed: milliseconds[row["choices"]][0] for seed, row in each.items()}
        for each in (own, base)
    )
    faster = math.exp(statistics.fmean(math.log(base_times[s] / own_times[s]) for s in own_times))
    choices = [row["choices"] for row in own.values()]
    often = sorted(set(choices), key=lambda choice: -choices.count(choice))
    return (
        variant,
        f"{statistics.fmean(accuracies.values()):.2f}%",
        "" if variant == BASE else f"{difference:+.2f}" + (f" ± {error:.2f}" if error else ""),
        f"{statistics.fmean(own_times.values()):.4f}",
        f"{faster:.2f}",
        "; ".join(f"{choices.count(choice)} x {choice}" for choice in often),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="searches at a time")
    parser.add_argument("--times", action="store_true", help="time what was found before again")
    parser.add_argument("--quick", action="store_true", help="one seed, kept under runs/")
    arguments = parser.parse_args()
    folder = results_folder(arguments.quick)
    file = folder / "search_cost.json"
    if arguments.times:
        found = json.loads(file.read_text())
    else:
        found = measure(1 if arguments.quick else arguments.seeds, arguments.jobs)
    found["conditions"] = conditions("as it is")
    found["milliseconds"] = times(found["rows"], 30 if arguments.quick else 300)
    file.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(markdown(found)) + "\n"
    (folder / "search_cost.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
