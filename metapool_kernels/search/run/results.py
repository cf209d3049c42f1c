"""What a finished run has left in its folder, read back for pictures and the report."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.files.json_file import parse_json, to_object
from metapool_kernels.search.networks.architecture import Architecture, load_architecture
from metapool_kernels.search.run import run_folder
from metapool_kernels.search.run.cost_table import amount
from metapool_kernels.search.run.run_folder import PROBABILITIES, SEARCHED, RunFolder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.settings.config_file import load_config

T = TypeVar("T")

INHERITED = "inherited"
"""The searched network with the weights that the search has left, before any training."""

_MAY_BE_EMPTY = ("loss", "accuracy", "alpha_loss", "alpha_accuracy")
"""In a search: weights or alphas that are not trained in an epoch have none."""


@dataclass
class SearchEpoch:
    """One line of ``metrics.csv`` of a search.

    Args:
        epoch: from 1.
        loss: mean over the steps on the weight half; None where weights are not trained.
        accuracy: likewise, in percent.
        alpha_loss: mean over the steps on the alpha half; None while warming up.
        alpha_accuracy: likewise, in percent.
        seconds: what the epoch took.
        step_ms: mean time of a step, in milliseconds.
        stopped: how many layers had stopped at the end of the epoch.
        expected_cost: at the end of the epoch, in times the network with skip_connect in every
            layer; None without ``search.cost.file``.
        cost_weight: what one unit of it then weighed.
    """

    epoch: int
    loss: float | None
    accuracy: float | None
    alpha_loss: float | None
    alpha_accuracy: float | None
    seconds: float
    step_ms: float
    stopped: int
    expected_cost: float | None = None
    cost_weight: float | None = None


@dataclass
class TrainingEpoch:
    """One line of ``metrics.csv`` of a network's training: mean loss, accuracy in percent."""

    epoch: int
    loss: float
    accuracy: float
    seconds: float


@dataclass
class Probabilities:
    """``probabilities.json``: of each candidate, at the start and after each epoch.

    ``epochs`` holds the layers alone that were open then.
    """

    layers: list[str]
    epochs: list[dict[str, list[float]]]


@dataclass
class SeedResult:
    """How one trained network did on the evaluation split; ``accuracy`` in percent."""

    correct: int
    accuracy: float
    loss: float
    cost: float | None = None


@dataclass
class NetworkResult:
    """How one kind of network did, over its seeds; ``mean`` and ``std`` in percent."""

    start: str
    epochs: int
    parameters: int
    seeds: dict[str, SeedResult]
    mean: float
    std: float | None

    @property
    def cost(self) -> float | None:
        """Mean over the seeds, which differ where choices are drawn, if it is known."""
        costs = [seed.cost for seed in self.seeds.values() if seed.cost is not None]
        return fmean(costs) if len(costs) == len(self.seeds) else None


@dataclass
class CostUnit:
    """What costs are: where and in what they were measured, and that of skip_connect everywhere."""

    target: str
    unit: str
    skip: float

    def text(self, cost: float | None) -> str:
        """A cost in words, also as a multiple of the network with skip_connect; "" for None."""
        return "" if cost is None else f"{amount(cost, self.unit)} ({cost / self.skip:.2f})"


@dataclass
class Evaluation:
    """``evaluation.json``: how many images, each kind of network by its name, what costs are.

    ``inherited`` is none of the networks that were trained to be compared.
    """

    images: int
    networks: dict[str, NetworkResult]
    cost: CostUnit | None = None
    inherited: NetworkResult | None = None

    @property
    def rows(self) -> dict[str, NetworkResult]:
        """What a table shows: ``inherited``, if it is known, follows the searched network."""
        if self.inherited is None:
            return self.networks
        first = {name: one for name, one in self.networks.items() if name == SEARCHED}
        return {**first, INHERITED: self.inherited, **self.networks}


@dataclass
class Results:
    """Everything that pictures and report show.

    Args:
        config: the settings.
        architecture: what was found.
        search: one for each epoch of the search.
        probabilities: how it got there.
        training: the epochs of each network that was trained, by its kind, one list for each seed.
        evaluation: None before ``metapool evaluate``.
    """

    config: Config
    architecture: Architecture
    search: list[SearchEpoch]
    probabilities: Probabilities
    training: dict[str, list[list[TrainingEpoch]]]
    evaluation: Evaluation | None


def load_results(run: RunFolder) -> Results:
    """Read the folder of a finished search.

    Raises:
        UserError: the search is not finished, or a file is damaged.
    """
    architecture = load_architecture(run / run_folder.ARCHITECTURE)
    probabilities = _load_json(run / PROBABILITIES, Probabilities)
    _check_lengths(architecture, run / run_folder.ARCHITECTURE)
    _check_probabilities(probabilities, architecture, run / PROBABILITIES)
    training: dict[str, list[list[TrainingEpoch]]] = {}
    for path in sorted((run / run_folder.ADAPT).glob(f"*/*/{run_folder.METRICS}")):
        name = run_folder.network_in(path.parents[1].name)
        training.setdefault(name, []).append(_load_csv(path, TrainingEpoch))
    evaluation = None
    if (run / run_folder.EVALUATION).exists():
        evaluation = _load_json(run / run_folder.EVALUATION, Evaluation)
        if not all(result.seeds for result in evaluation.rows.values()):
            raise UserError(f"{str(run / run_folder.EVALUATION)!r} has a network without a seed")
    return Results(
        config=load_config(run / run_folder.CONFIG),
        architecture=architecture,
        search=_load_csv(run / run_folder.METRICS, SearchEpoch),
        probabilities=probabilities,
        training=training,
        evaluation=evaluation,
    )


def _check_lengths(architecture: Architecture, path: Path) -> None:
    candidates = len(architecture.candidates) + len(architecture.extra_candidates)
    wrong = [layer.name for layer in architecture.layers if len(layer.alpha) != candidates]
    if wrong or not architecture.layers:
        raise UserError(
            f"{str(path)!r} should hold layers with {candidates} architecture parameters each; "
            f"wrong: {wrong or 'there is no layer'}"
        )


def _check_probabilities(
    probabilities: Probabilities, architecture: Architecture, path: Path
) -> None:
    layers = [layer.name for layer in architecture.layers]
    candidates = len(architecture.candidates) + len(architecture.extra_candidates)
    rows = [row for epoch in probabilities.epochs for row in epoch.values()]
    strangers = {name for epoch in probabilities.epochs for name in epoch} - set(layers)
    wrong = [row for row in rows if len(row) != candidates or not _is_distribution(row)]
    if set(probabilities.layers) != set(layers) or strangers or wrong:
        raise UserError(
            f"{str(path)!r} does not belong to the architecture beside it: it should hold "
            f"{candidates} probabilities for each of {len(layers)} layers; search again"
        )


def _is_distribution(row: Sequence[float]) -> bool:
    return min(row) >= 0 and math.isclose(sum(row), 1, rel_tol=1e-3)


def _load_json(path: Path, kind: type[T]) -> T:
    try:
        content = parse_json(_read(path))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not a complete JSON file: {error}") from error
    return to_object(path, kind, content)


def _load_csv(path: Path, kind: type[T]) -> list[T]:
    text = _read(path)
    reader = csv.DictReader(io.StringIO(text))
    # A cut in the last number would leave another number; only the end of the line tells.
    if not text.endswith("\n"):
        raise UserError(f"{str(path)!r} is cut off: its last line has no end")
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    columns = []
    for name, field in known.items():
        count = list(reader.fieldnames or ()).count(name)
        if count == 0 and field.default is not MISSING:
            continue
        columns.append(name)
        if count != 1:
            raise UserError(f"{str(path)!r} has {count or 'no'} column{'s'[:count]} {name!r}")
    lines = list(reader)
    if not lines:
        raise UserError(f"{str(path)!r} holds no epoch")
    return [_epoch(path, kind, {name: line[name] for name in columns}) for line in lines]


def _epoch(path: Path, kind: type[T], line: dict[str, str | None]) -> T:
    values: dict[str, float | None] = {}
    try:
        for name, text in line.items():
            if name in ("epoch", "stopped"):
                values[name] = int(text or "")
            elif text == "" and kind is SearchEpoch and name in _MAY_BE_EMPTY:
                values[name] = None
            else:
                values[name] = float(text or "")
    except ValueError as error:
        raise UserError(f"{str(path)!r} has a damaged line {line}: {error}") from error
    return kind(**values)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}; search again") from error
