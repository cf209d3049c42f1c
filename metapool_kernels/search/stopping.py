"""When a layer's choice is fixed. Numbers only: nothing here knows a network."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from metapool_kernels.search.config import Rule, SearchConfig, StopConfig
from metapool_kernels.search.errors import UserError

Reason = Literal[Rule, "deadline", "end"]

_UNDECIDED: tuple[tuple[int, ...], int] = ((), 0)
"""What the rule has found, and at how many checks in a row."""


@dataclass(frozen=True)
class Stop:
    """A layer that is fixed.

    ``keep`` are the positions of the candidates that stay, best first; ``probability`` and
    ``margin`` the averaged probability of the best and its lead; ``epoch`` counts from 1;
    ``reason`` is the rule that stopped it, ``deadline``, or ``end`` of a layer that was left open
    to the last epoch.
    """

    layer: str
    keep: tuple[int, ...]
    probability: float
    margin: float
    epoch: int
    reason: Reason


def ranking(probabilities: Sequence[float]) -> tuple[int, ...]:
    """Positions by probability, the largest first; the earlier one first among equals."""
    return tuple(sorted(range(len(probabilities)), key=lambda k: -probabilities[k]))


def margin(probabilities: Sequence[float]) -> float:
    """By how much the largest leads the second; all of it where there is no second."""
    first, second = sorted([0.0, *probabilities], reverse=True)[:2]
    return first - second


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


def _stable_ranking(probabilities: Sequence[float], config: StopConfig) -> tuple[int, ...]:
    return ranking(probabilities)[: config.top]


_RULES: dict[Rule, Callable[[Sequence[float], StopConfig], tuple[int, ...]]] = {
    "margin": _margin,
    "max_probability": _max_probability,
    "entropy": _entropy,
    "stable_ranking": _stable_ranking,
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

    def check(self, epoch: int) -> list[Stop]:
        """The layers that are decided at the end of ``epoch`` (from 1), which are still open."""
        return [stop for layer in self.open_layers if (stop := self._check_layer(layer, epoch))]

    def fix(self, stops: Sequence[Stop]) -> None:
        """Take what :meth:`check` has found, here or in another process, as final."""
        self.stops |= {stop.layer: stop for stop in stops}

    def _check_layer(self, layer: str, epoch: int) -> Stop | None:
        average = self.averages.get(layer)
        if average is None:
            return None
        order = ranking(average)
        keep, reason = self._verdict(layer, average, epoch)
        if reason is None:
            return None
        return Stop(layer, order[:keep], average[order[0]], margin(average), epoch, reason)

    def _verdict(
        self, layer: str, average: Sequence[float], epoch: int
    ) -> tuple[int, Reason | None]:
        """How many candidates the layer keeps and why, with None for a layer that stays open."""
        if self.progressive:
            found = _RULES[self.config.rule](average, self.config)
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
