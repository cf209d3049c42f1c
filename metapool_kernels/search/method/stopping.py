"""When a layer's choice is fixed. Numbers only: nothing here knows a network."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import Rule, SearchConfig, StopConfig

Reason = Literal[Rule, "deadline", "end"]

_UNDECIDED: tuple[tuple[int, ...], int] = ((), 0)
"""What the rule has found, and at how many checks in a row."""


@dataclass(frozen=True)
class Stop:
    """A layer that is fixed.

    ``keep`` are the positions of the candidates that stay, best first; ``probability`` and
    ``margin`` the averaged probability of the best and its lead, which is negative where the
    perturbation rule has preferred another than the most probable; ``epoch`` counts from 1;
    ``reason`` is the rule that stopped it, ``deadline``, or ``end`` of a layer that was left open
    to the last epoch; ``importances``, of the perturbation rule, by how much the loss on the
    alpha half rose without each candidate.
    """

    layer: str
    keep: tuple[int, ...]
    probability: float
    margin: float
    epoch: int
    reason: Reason
    importances: tuple[float, ...] = ()


def ranking(scores: Sequence[float]) -> tuple[int, ...]:
    """Positions by score, the largest first; the earlier one first among equals."""
    return tuple(sorted(range(len(scores)), key=lambda k: -scores[k]))


def margin(probabilities: Sequence[float], best: int | None = None) -> float:
    """By how much ``best``, or else the largest, leads the others; all of it without any."""
    best = ranking(probabilities)[0] if best is None else best
    others = (p for k, p in enumerate(probabilities) if k != best)
    return probabilities[best] - max(others, default=0.0)


def relative_entropy(probabilities: Sequence[float]) -> float:
    """Entropy as a share of that of equal probabilities; 0 where there is one candidate."""
    if len(probabilities) == 1:
        return 0.0
    return -sum(p * math.log(p) for p in probabilities if p > 0) / math.log(len(probabilities))


def _margin(probabilities: Sequence[float], config: StopConfig) -> tuple[int, ...]:
    return ranking(probabilities)[:1] if margin(probabilities) >= config.delta else ()


def _max_probability(probabilities: Sequence[float], config: StopConfig) -> tuple[int, ...]:
    return ranking(probabilities)[:1] if max(probabilities) >= config.probability else ()


def _entropy(probabilities: Sequence[float], config: StopConfig) -> tuple[int, ...]:
    low = relative_entropy(probabilities) <= config.entropy
    return ranking(probabilities)[:1] if low else ()


def _perturbation(importances: Sequence[float], config: StopConfig) -> tuple[int, ...]:
    return ranking(importances)[:1]


def _stable_ranking(probabilities: Sequence[float], config: StopConfig) -> tuple[int, ...]:
    return ranking(probabilities)[: config.top]


_RULES: dict[Rule, Callable[[Sequence[float], StopConfig], tuple[int, ...]]] = {
    "margin": _margin,
    "max_probability": _max_probability,
    "entropy": _entropy,
    "stable_ranking": _stable_ranking,
    "perturbation": _perturbation,
}
"""What must be found again at each check in a row; () where nothing is decided."""


def phases(config: SearchConfig) -> tuple[int, int]:
    """Epochs of the warm-up, and the epoch (from 1) at whose end no layer stays open.

    Raises:
        UserError: no epoch is left between the two.
    """
    warmup = round(config.warmup * config.epochs) if config.train_weights else 0
    deadline = config.epochs
    if config.stop.keep != "open":
        deadline = round(config.stop.deadline * config.epochs)
    if warmup >= deadline:
        raise UserError(
            f"alpha is never trained: of search.epochs {config.epochs}, search.warmup takes "
            f"{warmup} and search.stop.deadline comes after {deadline}"
        )
    return warmup, deadline


class ProgressiveStopping:
    """A rule with patience, on averaged probabilities, and the deadline.

    Args:
        layers: names of the layers, all open at first.
        config: the rule; its ``deadline``, a share, is not read here.
        deadline: epoch, from 1, at whose end no layer stays open.
        progressive: False applies no rule before the deadline.
    """

    def __init__(
        self,
        layers: Sequence[str],
        config: StopConfig,
        *,
        deadline: int,
        progressive: bool = True,
    ) -> None:
        self.config = config
        self.deadline = deadline
        self.progressive = progressive
        self.averages: dict[str, list[float]] = {}
        self.found = dict.fromkeys(layers, _UNDECIDED)
        self.stops: dict[str, Stop] = {}

    @property
    def open_layers(self) -> list[str]:
        """The layers that still learn, in the order given."""
        return [layer for layer in self.found if layer not in self.stops]

    def update(self, probabilities: Mapping[str, Sequence[float]]) -> None:
        """Take the open layers' probabilities into the averages; called after each alpha step."""
        decay = self.config.ema
        for layer in self.open_layers:
            new = probabilities[layer]
            old = self.averages.get(layer, new)
            self.averages[layer] = [
                decay * a + (1 - decay) * b for a, b in zip(old, new, strict=True)
            ]

    def asks_for_importances(self, epoch: int) -> bool:
        """Whether :meth:`check` has to be given them at the end of ``epoch``."""
        checks = self.progressive or epoch >= self.deadline
        return self.config.rule == "perturbation" and bool(self.averages) and checks

    def check(
        self, epoch: int, importances: Mapping[str, Sequence[float]] | None = None
    ) -> list[Stop]:
        """The layers that are decided at the end of ``epoch`` (from 1), which are still open.

        Args:
            epoch: from 1.
            importances: of the open layers' candidates, if :meth:`asks_for_importances`.
        """
        measured = importances or {}
        stops = (
            self._check_layer(layer, epoch, tuple(measured.get(layer, ())))
            for layer in self.open_layers
        )
        return [stop for stop in stops if stop is not None]

    def fix(self, stops: Sequence[Stop]) -> None:
        """Take what :meth:`check` has found, here or in another process, as final."""
        self.stops |= {stop.layer: stop for stop in stops}

    def _check_layer(self, layer: str, epoch: int, importances: tuple[float, ...]) -> Stop | None:
        average = self.averages.get(layer)
        if average is None:
            return None
        scores = importances or average
        keep, reason = self._verdict(layer, scores, epoch)
        if reason is None:
            return None
        kept = ranking(scores)[:keep]
        lead = margin(average, kept[0])
        return Stop(layer, kept, average[kept[0]], lead, epoch, reason, importances)

    def _verdict(
        self, layer: str, scores: Sequence[float], epoch: int
    ) -> tuple[int, Reason | None]:
        """How many candidates the layer keeps and why, with None for a layer that stays open."""
        if self.progressive:
            found = _RULES[self.config.rule](scores, self.config)
            before, times = self.found[layer]
            self.found[layer] = (found, times + 1 if found == before else 1)
            if found and self.found[layer][1] >= self.config.patience:
                return 1, self.config.rule
        if epoch < self.deadline:
            return 0, None
        if self.config.keep == "open":
            return 1, "end"
        return (2 if self.config.keep == "top-2" else 1), "deadline"

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes, in plain Python types."""
        return {
            "averages": {layer: list(average) for layer, average in self.averages.items()},
            "found": dict(self.found),
            "stops": [asdict(stop) for stop in self.stops.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.averages = {layer: list(average) for layer, average in state["averages"].items()}
        self.found = dict(state["found"])
        self.stops = {stop["layer"]: Stop(**stop) for stop in state["stops"]}
