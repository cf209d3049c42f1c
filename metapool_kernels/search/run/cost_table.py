"""``cost.json``: what each candidate costs in each layer, measured, counted or written by hand."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.files.json_file import Format
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.settings.config import CostConfig

SKIP = "skip_connect"
"""What costs nothing: all costs are beyond those of the network with it in every layer."""


class Place(Protocol):
    """A layer, as surgery finds it and as an architecture has it."""

    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> int: ...

    @property
    def map_size(self) -> tuple[int, int]: ...


@dataclass
class LayerCost:
    """One layer.

    Args:
        name: of the module that the enhancer follows.
        channels: of the maps there.
        map_size: height and width of the maps there, in pixels.
        costs: of each candidate beyond skip_connect in its place.
    """

    name: str
    channels: int
    map_size: tuple[int, int]
    costs: dict[str, float]


@dataclass
class Probe:
    """A whole network, to see how well the sum over its layers predicts it.

    Args:
        choices: the candidate in each layer.
        cost: of the network, measured as a whole.
        sum: the same by the table.
    """

    choices: list[str]
    cost: float
    sum: float


@dataclass
class CostTable:
    """The costs of a network.

    Args:
        target: where they were measured, or how they were counted.
        unit: of all costs, such as ``seconds``.
        backbone: the network without enhancers.
        skip: cost of the whole network with skip_connect in every layer.
        layers: one for each enhancer.
        none: cost of the whole network without enhancers, if it is known.
        probes: whole networks, beside what the table says of them.
        machine: what it was measured on.
        versions: of the libraries.
    """

    target: str
    unit: str
    backbone: Backbone
    skip: float
    layers: list[LayerCost]
    none: float | None = None
    probes: list[Probe] = field(default_factory=list)
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def network(self, choices: Mapping[str, Iterable[str]]) -> float | None:
        """Cost of a network with some candidates in each layer; None where one is not known.

        Several in one layer all run, whatever their weights, and cost what they cost together.
        """
        total = self.skip
        for layer in self.layers:
            for candidate in choices[layer.name]:
                if candidate != SKIP and candidate not in layer.costs:
                    return None
                total += layer.costs.get(candidate, 0.0)
        return total

    def relative(self, candidates: Sequence[str]) -> dict[str, list[float]]:
        """Costs of the candidates, by layer, as shares of the network with skip_connect."""
        return {
            layer.name: [layer.costs.get(name, 0.0) / self.skip for name in candidates]
            for layer in self.layers
        }

    def fitted(
        self,
        name: str,
        backbone: Backbone | None,
        layers: Sequence[Place],
        candidates: Iterable[str],
    ) -> "CostTable":
        """The same with these layers alone, in their order.

        Args:
            name: of the table, for messages.
            backbone: that it has to be of; None: any with such layers.
            layers: that it has to have, with maps of the same size.
            candidates: whose costs it has to have in each of them.

        Raises:
            UserError: it is of another network, or something is missing in it.
        """
        mine = backbone or self.backbone
        own, other = (json.loads(json.dumps(asdict(kind))) for kind in (mine, self.backbone))
        changed = [f"{key} {other[key]} for {own[key]}" for key in own if own[key] != other[key]]
        if changed:
            raise UserError(f"{name} is of another network ({'; '.join(changed)}); {_AGAIN}")
        known = {layer.name: layer for layer in self.layers}
        wanted = set(candidates) - {SKIP}
        found = [_layer(name, known.get(layer.name), layer, wanted) for layer in layers]
        return replace(self, layers=found)


_AGAIN = "run 'metapool cost' with the settings of the search"


def _layer(name: str, found: LayerCost | None, wanted: Place, candidates: set[str]) -> LayerCost:
    size = (wanted.channels, wanted.map_size)
    where = f"layer {wanted.name!r} ({size[0]} channels, maps of {'x'.join(map(str, size[1]))})"
    if found is None or (found.channels, found.map_size) != size:
        raise UserError(f"{name} lacks {where}; {_AGAIN}")
    missing = sorted(candidates - found.costs.keys())
    if missing:
        raise UserError(f"{name} lacks {', '.join(missing)} in {where}; {_AGAIN}")
    return found


def _check(table: CostTable) -> None:
    if not 0 < table.skip < math.inf:
        raise ValueError(f"skip, the cost of a whole network, should be positive, got {table.skip}")
    wholes = [table.none, *(n for probe in table.probes for n in (probe.cost, probe.sum))]
    for cost in wholes:
        if cost is not None and not 0 <= cost < math.inf:
            raise ValueError(f"a whole network costs {cost}")
    names = [layer.name for layer in table.layers]
    if len(set(names)) < len(names):
        raise ValueError(f"layers should have different names, got {names}")
    for layer in table.layers:
        for candidate, cost in layer.costs.items():
            if not 0 <= cost < math.inf:
                raise ValueError(f"{candidate} in layer {layer.name!r} costs {cost}")
        if layer.costs.get(SKIP):
            raise ValueError(
                f"{SKIP} in layer {layer.name!r} costs {layer.costs[SKIP]}; give what candidates "
                f"cost beyond {SKIP}, which has 0"
            )


FORMAT = Format(
    kind=CostTable,
    name="metapool-cost",
    version=1,
    what="a cost table of metapool cost",
    origin="'metapool cost' writes one",
    check=_check,
)


def load_table(config: CostConfig) -> CostTable | None:
    """The table that a search is to use.

    Raises:
        UserError: there is no such file, a damaged one, or one is needed and none is given.
    """
    if config.file is not None:
        return FORMAT.load(Path(config.file))
    if config.weight or config.budget is not None:
        raise UserError(
            "search.cost.weight and search.cost.budget need search.cost.file; 'metapool cost' "
            "writes one"
        )
    return None


_SCALES = {1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "µ", 1e-9: "n"}


def scale_of(cost: float) -> tuple[float, str]:
    """A power of 1000 to divide a cost by, and its prefix."""
    return next((pair for pair in _SCALES.items() if cost >= pair[0]), (1.0, ""))


def amount(cost: float, unit: str) -> str:
    """A cost in words, such as ``3.2 ms`` or ``12.5 M MACs``."""
    scale, prefix = scale_of(cost)
    return f"{cost / scale:.3g} {prefixed(prefix, unit)}"


def prefixed(prefix: str, unit: str) -> str:
    """A unit behind its prefix, such as ``ms`` or ``M MACs``."""
    return f"{prefix}s" if unit == "seconds" else " ".join((*prefix, unit))
