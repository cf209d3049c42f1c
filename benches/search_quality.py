"""``python -m benches.search_quality``: does the search find what is there, and at what cost?

Planted windows, recovered with the weights given and with the weights learned; accuracy on images
of MNIST and on the digits beside controls, paired by seed; seconds of an epoch beside the eager
mix. Every search is one run of the command line in a process of its own. Leaves
``search_quality.json`` and ``.md`` under ``benches/results/``. An hour and a half on two cores;
``--quick`` takes one seed each, ``--only mnist`` one part.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benches.conditions import conditions
from benches.report import results_folder
from benches.search_epoch import ALL_OPEN, CONFIGS, EAGER, OURS, epoch_seconds, make_config, ratio
from benches.tables import table
from metapool_kernels.search.data.planted import planted_windows
from metapool_kernels.search.report.gains import paired_difference

GIVEN = {
    "model.weights": "teacher",
    "search.train_weights": False,
    "search.warmup": 0.0,
    "search.alpha.lr": 0.02,
}
"""What configs/planted.yaml names for a search of alpha alone."""

METAPOOL = (sys.executable, "-m", "metapool_kernels.search")

MNIST = {
    "adapt.seeds": 2,
    "adapt.controls": '["none", "skip", "random", "uniform", "fixed:avg_pool_7x7", '
    '"fixed:max_pool_7x7"]',
}
"""Two trainings of each network for each search, so two random choices; and the largest windows."""

LARGE = {
    "data.image_size": 224,
    "data.holdout": 0.96,
    "model.name": "mobilenetv2_100",
    "model.arguments": {},
    "model.keep_dilation": True,
    "search.warmup": 0.0,
    "threads": 2,
}
"""The digits as images of the usual size, in the network of the paper: four steps an epoch."""


TILTED = {"search.alpha.tilt": math.log(4), "search.alpha.tasks": 2}

PLANTED: dict[str, dict[str, Any]] = {
    "given": GIVEN,
    "learned": {},
    "learned, by perturbation": {
        "search.stop.rule": "perturbation",
        "search.stop.patience": 6,
        "search.stop.batches": 8,
    },
    "learned, as pmpl": {**TILTED, "search.alpha.method": "fomaml"},
    "learned, as pmpl, second order": {**TILTED, "search.alpha.method": "second-order"},
}
"""Settings beside those of configs/planted.yaml, which are first-order and without tasks."""


def metapool(command: str, config: str, folder: Path, seed: int, changes: Mapping[str, Any]) -> str:
    """One command in its own process; what it printed."""
    settings = {"output": folder, "seed": seed, **changes}
    options = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [*METAPOOL, command, "--config", str(CONFIGS / f"{config}.yaml"), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"metapool {command} failed with seed {seed}: {done.stderr}")
    return done.stdout


def planted(seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """One search for the teacher's windows: what was planted, what was found."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        metapool("search", "planted", run, seed, changes)
        layers = json.loads((run / "architecture.json").read_text())["layers"]
    config = make_config("planted", {"output": "none", "seed": seed, **changes})
    return {
        "seed": seed,
        "planted": planted_windows(config),
        "found": [layer["choice"][0] for layer in layers],
        "reasons": [layer["reason"] for layer in layers],
        "candidates": len(config.model.candidates),
        "seconds": time.perf_counter() - began,
    }


def compared(seed: int, config: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Search, adapt and evaluate with one seed: the accuracy of each network."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        for command in ("search", "adapt", "evaluate"):
            metapool(command, config, run, seed, changes)
        networks = json.loads((run / "evaluation.json").read_text())["networks"]
        layers = json.loads((run / "architecture.json").read_text())["layers"]
    return {
        "seed": seed,
        "accuracy": {name: network["mean"] for name, network in networks.items()},
        "choices": [" + ".join(layer["choice"]) for layer in layers],
    }


def recovered(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Layers found and layers there are, over all seeds."""
    pairs = [pair for row in rows for pair in zip(row["planted"], row["found"], strict=True)]
    return sum(truth == found for truth, found in pairs), len(pairs)


def several(work: Callable[[int], dict[str, Any]], seeds: int, jobs: int) -> list[dict[str, Any]]:
    """``work`` for each seed, ``jobs`` at a time, telling of each."""
    with ThreadPoolExecutor(jobs) as pool:
        rows = []
        for row in pool.map(work, range(seeds)):
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def measure_epochs(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of each epoch, while nothing else runs."""
    epochs = 2 if arguments.quick else 8
    large = {"output": "none", **LARGE}
    return {
        "digits": epoch_seconds("digits", {"output": "none"}, epochs, (OURS, ALL_OPEN, EAGER)),
        "224 x 224": epoch_seconds("digits", large, min(epochs, 4), (ALL_OPEN, EAGER)),
    }


def measure_planted(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All searches for planted windows, by what they know and how they go about it."""
    return {
        name: several(partial(planted, changes=changes), arguments.seeds, arguments.jobs)
        for name, changes in PLANTED.items()
        if name in (arguments.variants or PLANTED)
    }


def measure_mnist(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What `make search` shows, with more searches; no two of them train with the same seed."""

    def work(number: int) -> dict[str, Any]:
        return compared(2 * number, "mnist", MNIST)

    return several(work, arguments.seeds, arguments.jobs)


def measure_digits(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Half as many seeds: its networks are larger."""
    work = partial(compared, config="digits", changes={})
    return several(work, max(1, arguments.seeds // 2), arguments.jobs)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "epochs": measure_epochs,
    "planted": measure_planted,
    "mnist": measure_mnist,
    "digits": measure_digits,
}


def markdown(found: Mapping[str, Any]) -> Iterator[str]:
    """The report, of the parts that have been measured."""
    yield "# Does the search find what is there?\n"
    yield "Made by `python -m benches.search_quality`.\n"
    for name, text in found["conditions"].items():
        yield f"- {name}: {text}"
    for part, section in SECTIONS.items():
        if part in found:
            yield from section(found)


def _planted_section(found: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## Planted windows\n"
    yield "Layers whose window the search has named, over all seeds (`configs/planted.yaml`).\n"
    yield from table(
        ("weights", "seeds", "recovered", "share", "random", "s per seed"), _shares(found)
    )


def _accuracy_section(found: Mapping[str, Any], part: str, title: str) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield f"Accuracy on the held-out images of `configs/{part}.yaml`: for each seed a search, and"
    yield "the mean over trainings of each network. The last column is how much more the searched"
    yield "network has: mean of the differences by seed, its standard error.\n"
    head = ("network", "mean", "standard deviation", "each seed", "searched has more by")
    yield from table(head, _accuracies(found[part]))
    yield (
        "\nChoices, seed by seed: " + "; ".join(", ".join(r["choices"]) for r in found[part]) + "."
    )


def _epochs_section(found: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## Seconds of a search epoch\n"
    yield "Medians; epochs of the variants in turn; ratios of epochs next to each other.\n"
    head = ("search", OURS, OURS + " in the last epoch", ALL_OPEN, EAGER, "eager / ours")
    yield from table(head, _times(found["epochs"]))


SECTIONS: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "mnist": partial(_accuracy_section, part="mnist", title="MNIST"),
    "planted": _planted_section,
    "digits": partial(_accuracy_section, part="digits", title="Digits"),
    "epochs": _epochs_section,
}


def _shares(found: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, rows in found["planted"].items():
        right, layers = recovered(rows)
        seconds = statistics.median(row["seconds"] for row in rows)
        yield (
            name,
            str(len(rows)),
            f"{right} of {layers}",
            f"{right / layers:.0%}",
            f"{1 / rows[0]['candidates']:.0%}",
            f"{seconds:.0f}",
        )


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    by_seed = {
        name: {str(row["seed"]): row["accuracy"][name] for row in rows}
        for name in rows[0]["accuracy"]
    }
    for name, accuracies in by_seed.items():
        values = list(accuracies.values())
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.2f}" for value in values)
        gain, error = paired_difference(by_seed["searched"], accuracies)
        more = f"{gain:+.2f}" + ("" if error is None else f" ± {error:.2f}")
        mean = f"{statistics.mean(values):.2f}%"
        yield name, mean, spread, each, "" if name == "searched" else more


def _times(epochs: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[Sequence[str]]:
    for name, seconds in epochs.items():
        ours = seconds.get(OURS, [])
        yield (
            name,
            f"{statistics.median(ours):.1f}" if ours else "",
            f"{ours[-1]:.1f}" if ours else "",
            f"{statistics.median(seconds[ALL_OPEN]):.1f}",
            f"{statistics.median(seconds[EAGER]):.1f}",
            f"{ratio(seconds[EAGER], seconds[ALL_OPEN]):.2f}",
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="of the planted problem")
    parser.add_argument("--jobs", type=int, default=2, help="searches at a time")
    parser.add_argument("--quick", action="store_true", help="one seed, kept under runs/")
    parser.add_argument("--only", choices=PARTS, help="this part, beside what was measured before")
    parser.add_argument("--variants", nargs="+", choices=PLANTED, help="of the planted problem")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds = 1
    folder = results_folder(arguments.quick)
    file = folder / "search_quality.json"
    found = json.loads(file.read_text()) if arguments.only and file.exists() else {}
    found["conditions"] = conditions("as it is")
    for part in [arguments.only] if arguments.only else PARTS:
        new = PARTS[part](arguments)
        kept = found.get(part, {}) if part == "planted" else {}
        found[part] = {**kept, **new} if isinstance(new, dict) else new
        file.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(markdown(found)) + "\n"
    (folder / "search_quality.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
