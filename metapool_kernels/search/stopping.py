"""When a layer's choice is fixed. Numbers only: nothing here knows a network."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Reason = Literal["margin", "deadline"]

_NO_LEAD = (-1, 0)
"""Position of the candidate that leads clearly, and at how many checks in a row it has."""


@dataclass(frozen=True)
class Stop:
    """A layer that is fixed.

    ``keep`` are the positions of the candidates that stay, best first; ``probability`` and
    ``margin`` the averaged probability of the best and its lead; ``epoch`` counts from 1.
    """

    layer: str
    keep: tuple[int, ...]
    probability: float
    margin: float
    epoch: int
    reason: Reason


class ProgressiveStopping:
    """The margin rule with patience, on averaged probabilities, and the deadline.

    Args:
        layers: names of the layers, all open at first.
        delta: lead of the largest probability over the second that is asked for.
        patience: how many checks in a row must find it, with the same candidate ahead.
        ema: decay of the moving average; the first probabilities start it.
        deadline: epoch, from 1, at whose end every layer still open keeps its best two.
    """

    def __init__(
        self, layers: Sequence[str], *, delta: float, patience: int, ema: float, deadline: int
    ) -> None:
        self.delta = delta
        self.patience = patience
        self.ema = ema
        self.deadline = deadline
        self.averages: dict[str, list[float]] = {}
        self.leads = dict.fromkeys(layers, _NO_LEAD)
        self.stops: dict[str, Stop] = {}

    @property
    def open_layers(self) -> list[str]:
        """The layers that still learn, in the order given."""
        return [layer for layer in self.leads if layer not in self.stops]

    def update(self, probabilities: Mapping[str, Sequence[float]]) -> None:
        """Take the open layers' probabilities into the averages; called after each alpha step."""
        for layer in self.open_layers:
            new = probabilities[layer]
            old = self.averages.get(layer, new)
            self.averages[layer] = [
                self.ema * a + (1 - self.ema) * b for a, b in zip(old, new, strict=True)
            ]

    def check(self, epoch: int) -> list[Stop]:
        """Fix the layers that are decided at the end of ``epoch`` (from 1) and return them."""
        return [stop for layer in self.open_layers if (stop := self._check_layer(layer, epoch))]

    def _check_layer(self, layer: str, epoch: int) -> Stop | None:
        average = self.averages.get(layer)
        if average is None:
            return None
        ranking = sorted(range(len(average)), key=lambda k: -average[k])
        best = average[ranking[0]]
        margin = best - average[ranking[1]] if len(ranking) > 1 else best
        leader, checks = self.leads[layer]
        if margin < self.delta:
            self.leads[layer] = _NO_LEAD
        else:
            self.leads[layer] = (ranking[0], checks + 1 if leader == ranking[0] else 1)
        if self.leads[layer][1] >= self.patience:
            stop = Stop(layer, (ranking[0],), best, margin, epoch, "margin")
        elif epoch >= self.deadline:
            stop = Stop(layer, tuple(ranking[:2]), best, margin, epoch, "deadline")
        else:
            return None
        self.stops[layer] = stop
        return stop

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes, in plain Python types."""
        return {
            "averages": {layer: list(average) for layer, average in self.averages.items()},
            "leads": dict(self.leads),
            "stops": [asdict(stop) for stop in self.stops.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.averages = {layer: list(average) for layer, average in state["averages"].items()}
        self.leads = dict(state["leads"])
        self.stops = {stop["layer"]: Stop(**stop) for stop in state["stops"]}
