"""``metapool cost``: what each candidate costs in each layer, on a device or counted."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

import metapool_kernels
from metapool_kernels.devices import registry, run
from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.console import format_table, warn
from metapool_kernels.search.networks.attention import EXTRA_CANDIDATES
from metapool_kernels.search.networks.backbone import Backbone, make_backbone
from metapool_kernels.search.networks.counting import count
from metapool_kernels.search.networks.supernet import Supernet, build_supernet
from metapool_kernels.search.networks.surgery import Site, insert_enhancer
from metapool_kernels.search.run.controls import FIXED, network_names
from metapool_kernels.search.run.cost_table import (
    FORMAT,
    SKIP,
    CostTable,
    LayerCost,
    Probe,
    amount,
)
from metapool_kernels.search.run.run_folder import RunFolder
from metapool_kernels.search.settings.config import Config, ModelConfig

COUNTED = {"counted": "MACs", "counted-bytes": "bytes"}
"""Targets that are no device, and their units."""

LARGEST_SPREAD = 0.2
"""Of the quartiles around the median, from which on the user is warned."""

SAMPLES = 200
"""Of each small network: a second or two for them all."""

_NARROWER = 6
"""By how much the convolution behind an enhancer narrows its maps, as in MobileNetV2."""

Place = tuple[int, tuple[int, int]]
"""Channels, and height and width of the maps: what the cost of a candidate depends on."""


class Bench(NamedTuple):
    """Networks to be measured beside each other, and the (C, H, W) of one image for each."""

    networks: dict[str, nn.Module]
    shapes: dict[str, tuple[int, int, int]]

    def add(self, name: str, network: nn.Module, shape: tuple[int, int, int]) -> None:
        """Take one more."""
        self.networks[name] = network.eval()
        self.shapes[name] = shape


Measure = Callable[[Bench], dict[str, float]]
"""What gives the cost of each network."""


def run_cost(config: Config, *, target: str, file: str | None) -> None:
    """Measure or count, print a table, and write it for ``search.cost.file``.

    Args:
        config: the settings of the search.
        target: a name of ``metapool export --target``, or of :data:`COUNTED`.
        file: where the table goes; None: beside the run folder.

    Raises:
        UserError: the settings do not work, there is no such target, its packages are missing, it
            cannot take the networks, or the file cannot be written or is not to be overwritten.
    """
    path = Path(f"{Path(config.output)}.cost.json" if file is None else file)
    folder = RunFolder(path.parent)
    if path.exists():
        _check_is_table(path)
    folder.check_writable()
    unit, measure = _measure(target)
    data = load_data(config)
    backbone = make_backbone(config.model, data.image_shape, len(data.classes))
    table = make_table(config, backbone, target, unit, measure)
    folder.write(path.name, FORMAT.to_json(table))
    print(cost_text(table))
    print(f"costs: {path}; set search.cost.file to it, and search.cost.weight or .budget")


def _check_is_table(path: Path) -> None:
    try:
        FORMAT.load(path)
    except UserError as error:
        raise UserError(f"{error}; it is not overwritten, choose another --file") from error


def _measure(target: str) -> tuple[str, Measure]:
    """The unit, and what gives the costs of networks."""
    if target in COUNTED:
        unit = COUNTED[target]
        return unit, lambda bench: {
            name: float(getattr(count(network, bench.shapes[name]), unit.lower()))
            for name, network in bench.networks.items()
        }
    try:
        (name,) = registry.target_names([target])
        run.check_installed(name)
    except (ValueError, run.TargetError) as error:
        raise UserError(f"--target {target}: {error}; or take {' or '.join(COUNTED)}") from error

    def seconds(bench: Bench) -> dict[str, float]:
        try:
            found = run.measure_networks(name, bench.networks, bench.shapes, samples=SAMPLES)
        # Whatever a network does that cannot be traced: torch has no common base for these errors.
        except Exception as error:
            raise UserError(f"--target {target} cannot take these networks: {error}") from error
        warn(_spread_warnings([(one.upper - one.lower) / one.median for one in found.values()]))
        # What disturbs a sample makes it longer: the quicker ones are nearer to the truth.
        return {network: latency.lower for network, latency in found.items()}

    return "seconds", seconds


def _spread_warnings(spreads: Sequence[float]) -> list[str]:
    """Whether something else has run on the machine, by the quartiles' distances."""
    spread = median(spreads)
    if spread <= LARGEST_SPREAD:
        return []
    return [
        f"the quartiles lie {spread:.0%} of the median apart, so other programs have had their "
        "share of the machine; measure again when it is idle"
    ]


def make_table(
    config: Config, backbone: Backbone, target: str, unit: str, measure: Measure
) -> CostTable:
    """The costs of all candidates at all sites, and of a few whole networks.

    A candidate is measured in a small network, as it is surrounded in a large one, once for all
    layers with maps of the same size: what comes beyond skip_connect in its place is its cost.

    Raises:
        UserError: the model does not work.
    """
    supernet = build_supernet(backbone, config.model, config.seed)
    candidates = _candidates(config, supernet)
    in_turn = list(islice(cycle(candidates), len(supernet.sites)))
    found = measure(_bench(config.model, backbone, supernet.sites, candidates, in_turn))
    layers = [_layer(site, candidates, found) for site in supernet.sites]
    table = CostTable(
        target=target,
        unit=unit,
        backbone=backbone,
        skip=found[_SKIP_NETWORK],
        layers=layers,
        none=found[_NONE_NETWORK],
        machine=_machine(),
        versions=_versions(target),
    )
    total = table.network({layer.name: [c] for layer, c in zip(layers, in_turn, strict=True)})
    assert total is not None
    return replace(table, probes=[Probe(in_turn, found[_IN_TURN_NETWORK], total)])


_SKIP_NETWORK, _NONE_NETWORK, _IN_TURN_NETWORK = "skip", "none", "in turn"


def _bench(
    config: ModelConfig,
    backbone: Backbone,
    sites: Sequence[Site],
    candidates: Sequence[str],
    in_turn: Sequence[str],
) -> Bench:
    """Every candidate on every size of maps, and the whole networks."""
    bench = Bench({}, {})
    for place in dict.fromkeys((site.channels, site.map_size) for site in sites):
        for candidate in dict.fromkeys((SKIP, *candidates)):
            network = surrounded(candidate, place[0], config)
            bench.add(_name(place, candidate), network, (place[0], *place[1]))
    for name, choices in (_SKIP_NETWORK, [SKIP] * len(sites)), (_IN_TURN_NETWORK, in_turn):
        bench.add(name, _with_choices(backbone, config, sites, choices), backbone.image_shape)
    bench.add(_NONE_NETWORK, backbone.build(seed=0), backbone.image_shape)
    return bench


def _layer(site: Site, candidates: Sequence[str], found: Mapping[str, float]) -> LayerCost:
    place = (site.channels, site.map_size)
    skip = found[_name(place, SKIP)]
    # Noise makes some come out faster than nothing.
    costs = {candidate: max(0.0, found[_name(place, candidate)] - skip) for candidate in candidates}
    return LayerCost(site.name, *place, costs)


def _candidates(config: Config, supernet: Supernet) -> list[str]:
    """Those of the search and those of its controls."""
    fixed = [n for n in network_names(config.adapt.controls) if n.startswith(FIXED)]
    named = (*supernet.candidate_names, *(name.removeprefix(FIXED) for name in fixed))
    return list(dict.fromkeys(named))


def _name(place: Place, candidate: str) -> str:
    channels, (height, width) = place
    return f"{candidate} {channels} x {height} x {width}"


def surrounded(candidate: str, channels: int, config: ModelConfig) -> nn.Module:
    """A candidate between what is before and behind it in an inverted residual."""
    narrow = 8 * max(1, round(channels / _NARROWER / 8))  # eights are what runtimes lay out
    network = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.ReLU6(),
        nn.Conv2d(channels, narrow, 1, bias=False),
        nn.Flatten(),
    )
    _insert(network, "1", channels, candidate, config)
    return network


def _with_choices(
    backbone: Backbone, config: ModelConfig, sites: Sequence[Site], choices: Sequence[str]
) -> nn.Module:
    network = backbone.build(seed=0)
    for site, choice in zip(sites, choices, strict=True):
        _insert(network, site.name, site.channels, choice, config)
    return network


def _insert(
    network: nn.Module, name: str, channels: int, candidate: str, config: ModelConfig
) -> None:
    extra = candidate in EXTRA_CANDIDATES
    insert_enhancer(
        network,
        name,
        channels,
        [] if extra else [candidate],
        extra_candidates=[candidate] if extra else [],
        count_include_pad=config.count_include_pad,
        candidate_norm=config.candidate_norm,
    )


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _versions(target: str) -> dict[str, str]:
    known = {"metapool_kernels": metapool_kernels.__version__, "torch": torch.__version__}
    if target not in COUNTED:
        (name,) = registry.target_names([target])
        known |= registry.package_versions(registry.load_target(name))
    return known


def cost_text(table: CostTable) -> str:
    """Costs of all candidates, in times the whole network with skip_connect, by size of maps."""
    places: dict[Place, list[LayerCost]] = {}
    for layer in table.layers:
        places.setdefault((layer.channels, layer.map_size), []).append(layer)
    candidates = list(table.layers[0].costs)
    rows = [
        (
            str(channels),
            "x".join(map(str, size)),
            str(len(layers)),
            *(amount(layers[0].costs[candidate], table.unit) for candidate in candidates),
        )
        for (channels, size), layers in places.items()
    ]
    lines = [
        f"cost of a candidate in one layer, beyond {SKIP}, on {table.target}:",
        format_table(("channels", "map", "layers", *candidates), rows),
        f"network with {SKIP} in every layer: {amount(table.skip, table.unit)}",
    ]
    if table.none is not None:
        lines.append(f"network without enhancers: {amount(table.none, table.unit)}")
    lines += [
        f"network with {', '.join(dict.fromkeys(probe.choices))} in turn: "
        f"{amount(probe.cost, table.unit)}, by the table {amount(probe.sum, table.unit)} "
        f"({100 * (probe.sum / probe.cost - 1):+.0f}%)"
        for probe in table.probes
    ]
    return "\n".join(lines)
