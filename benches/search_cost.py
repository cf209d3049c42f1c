"""``python -m benches.search_cost``: is a network that was searched with costs faster, and as good?

On the problem of ``make search`` (``configs/mnist.yaml``): what candidates cost in onnxruntime is
measured once; then, for each weight of the costs and each seed, a search, and trainings of what it
has found. All networks that were found are timed beside each other in onnxruntime, whole. Leaves
``search_cost.json`` and ``.md`` under ``benches/results/``. Half an hour on two cores; ``--quick``
takes one seed.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benches.conditions import conditions, slug
from benches.report import QUICK_RESULTS, RESULTS
from benches.search_quality import metapool, several
from benches.tables import table
from metapool_kernels.devices.run import measure_networks
from metapool_kernels.search.architecture import load_architecture
from metapool_kernels.search.controls import build_network
from metapool_kernels.search.gains import paired_difference
from metapool_kernels.search.run_folder import ARCHITECTURE, SEARCHED

TARGET = "onnxruntime"
WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Of the expected cost, a multiple of what the network costs with skip_connect everywhere."""

IMAGE_SHAPE = (1, 28, 28)

TRAININGS = 2
ADAPT = {"adapt.seeds": TRAININGS, "adapt.controls": '["none", "random"]'}


def searched(
    number: int, weight: float, costs: Path, networks: dict[str, nn.Module]
) -> dict[str, Any]:
    """Search, adapt and evaluate with one seed: what was found, and its accuracy.

    The network goes into ``networks``, by its choices.
    """
    seed = TRAININGS * number  # no two searches share a training
    changes = {**ADAPT, "search.cost.file": costs, "search.cost.weight": weight}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        for command in ("search", "adapt", "evaluate"):
            metapool(command, "mnist", run, seed, changes)
        evaluated = json.loads((run / "evaluation.json").read_text())["networks"]
        architecture = load_architecture(run / ARCHITECTURE)
    choices = ", ".join(" + ".join(sorted(layer.choice)) for layer in architecture.layers)
    networks[choices] = build_network(SEARCHED, architecture, seed)
    return {
        "seed": seed,
        "choices": choices,
        "accuracy": {name: entry["mean"] for name, entry in evaluated.items()},
    }


def measure(seeds: int, jobs: int, weights: Sequence[float], samples: int) -> dict[str, Any]:
    """Everything: rows by weight, and milliseconds of each network by its choices."""
    networks: dict[str, nn.Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        costs = Path(folder, "cost.json")
        print(metapool("cost", "mnist", Path(folder, "run"), 0, {"target": TARGET, "file": costs}))
        rows = {
            str(weight): several(
                partial(searched, weight=weight, costs=costs, networks=networks), seeds, jobs
            )
            for weight in weights
        }
        cost_table = json.loads(costs.read_text())
    shapes = dict.fromkeys(networks, IMAGE_SHAPE)
    latencies = measure_networks(TARGET, networks, shapes, samples=samples)
    return {
        "cost table": cost_table,
        "rows": rows,
        "milliseconds": {
            name: [1e3 * seconds for seconds in latency] for name, latency in latencies.items()
        },
    }


def markdown(found: Mapping[str, Any]) -> Iterator[str]:
    """The report."""
    yield "# What costs change in a search\n"
    yield "Made by `python -m benches.search_cost`.\n"
    for name, text in found["conditions"].items():
        yield f"- {name}: {text}"
    yield f"\nImages of MNIST (`configs/mnist.yaml`), {TARGET}, one thread, one image. For each"
    yield f"weight and seed a search and {TRAININGS} trainings of its network. Times are those of"
    yield "whole networks, measured beside each other; how many times faster is the geometric mean"
    yield "over the seeds; differences are paired by seed, with their standard error.\n"
    head = ("weight of the cost", "accuracy", "more than weight 0", "ms", "times faster", "choices")
    yield from table(head, map(partial(_row, found), found["rows"]))
    yield "\n| network | ms: median | lower quartile | upper quartile |\n|---|---:|---:|---:|"
    for name, numbers in sorted(found["milliseconds"].items(), key=lambda pair: pair[1][0]):
        yield f"| {name} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |"


def _row(found: Mapping[str, Any], weight: str) -> Sequence[str]:
    rows, base = found["rows"][weight], found["rows"]["0.0"]
    accuracies = {str(row["seed"]): row["accuracy"][SEARCHED] for row in rows}
    difference, error = paired_difference(
        accuracies, {str(row["seed"]): row["accuracy"][SEARCHED] for row in base}
    )
    times, base_times = ([_milliseconds(found, row) for row in each] for each in (rows, base))
    faster = math.exp(
        statistics.fmean(math.log(b / t) for b, t in zip(base_times, times, strict=True))
    )
    choices = [row["choices"] for row in rows]
    often = sorted(set(choices), key=lambda choice: -choices.count(choice))
    return (
        weight,
        f"{statistics.fmean(accuracies.values()):.2f}%",
        "" if weight == "0.0" else f"{difference:+.2f}" + (f" ± {error:.2f}" if error else ""),
        f"{statistics.fmean(times):.4f}",
        f"{faster:.2f}",
        "; ".join(f"{choices.count(choice)} x {choice}" for choice in often),
    )


def _milliseconds(found: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    median: float = found["milliseconds"][row["choices"]][0]
    return median


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="searches at a time")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, help="0 is among them")
    parser.add_argument("--quick", action="store_true", help="one seed, kept under runs/")
    arguments = parser.parse_args()
    folder = QUICK_RESULTS if arguments.quick else RESULTS / slug()
    folder.mkdir(parents=True, exist_ok=True)
    weights = [0.0, *(weight for weight in arguments.weights if weight)]
    found = {"conditions": conditions("as it is")}
    seeds, samples = (1, 30) if arguments.quick else (arguments.seeds, 300)
    found |= measure(seeds, arguments.jobs, weights, samples)
    (folder / "search_cost.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(markdown(found)) + "\n"
    (folder / "search_cost.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
