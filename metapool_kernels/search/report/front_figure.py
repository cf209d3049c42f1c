"""Accuracy against cost, of the networks of one run and of what other runs have found."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.report.choice_figures import BLUE, GRAY, tidy
from metapool_kernels.search.report.run_figures import in_order, network_color, network_name
from metapool_kernels.search.run.cost_table import prefixed, scale_of
from metapool_kernels.search.run.results import CostUnit, NetworkResult, Results
from metapool_kernels.search.run.run_folder import SEARCHED
from metapool_kernels.search.settings.config import Config

MARK, OTHER = "*", "D"
"""Markers of the searched network of the run, and of those of other runs."""


@dataclass(frozen=True)
class Point:
    """A network: its cost, its mean accuracy in percent and the standard error of that."""

    label: str
    color: str
    cost: float
    accuracy: float
    error: float | None
    marker: str = "o"

    @property
    def searched(self) -> bool:
        """Whether it was found, here or in another run, and is no control."""
        return self.marker != "o"


def front_figure(results: Results, beside: Sequence[Results]) -> Figure:
    """Every network of a run whose cost is known, and the searched ones of other runs.

    Args:
        results: the run; its searched network is marked.
        beside: the others.

    Raises:
        UserError: a run has not been evaluated with costs, or with costs of another kind.
    """
    unit = _unit(results)
    points = [*_points(results), *(_other(other, results) for other in beside)]
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    panel = figure.subplots()
    scale, prefix = scale_of(max((point.cost for point in points), default=1.0))
    _draw_front(panel, points, scale)
    for point in points:
        panel.errorbar(
            *(point.cost / scale, point.accuracy),
            yerr=point.error,
            marker=point.marker,
            markersize=15 if point.marker == MARK else 7,
            color=point.color,
            linestyle="none",
            capsize=3,
            label=None if point.searched else point.label,
        )
        if point.searched:
            panel.annotate(
                point.label,
                (point.cost / scale, point.accuracy),
                xytext=(8, -11),
                textcoords="offset points",
                fontsize="small",
            )
    panel.set_xlabel(f"cost ({unit.target}) in {prefixed(prefix, unit.unit)}")
    panel.set_ylabel("accuracy on held-out images in %")
    panel.margins(x=0.15, y=0.12)
    if not all(point.searched for point in points):
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    tidy(panel)
    _add_multiples(panel, unit.skip / scale)
    return figure


def _add_multiples(panel: Axes, skip: float) -> None:
    """The same axis above, in times the network with skip_connect."""

    def times(cost: Any) -> Any:
        return cost / skip

    def cost(times: Any) -> Any:
        return times * skip

    above = panel.secondary_xaxis("top", functions=(times, cost))
    above.set_xlabel("times the network with skip_connect in every layer", fontsize="small")


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, from the cheapest on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def _draw_front(panel: Axes, points: Sequence[Point], scale: float) -> None:
    best = front(points)
    panel.plot(
        [point.cost / scale for point in best],
        [point.accuracy for point in best],
        drawstyle="steps-post",
        color=GRAY,
        linewidth=1.2,
        zorder=1,
    )


def _unit(results: Results) -> CostUnit:
    if results.evaluation is None or results.evaluation.cost is None:
        raise UserError(
            f"the run in {results.config.output!r} has not been evaluated with costs; run "
            "'metapool evaluate' with search.cost.file"
        )
    return results.evaluation.cost


def _points(results: Results) -> Iterator[Point]:
    assert results.evaluation is not None
    networks = results.evaluation.networks
    for kind in in_order(networks):
        label, marker = network_name(kind), "o"
        if kind == SEARCHED:
            label, marker = f"{label}, {setting(results.config)}", MARK
        if networks[kind].cost is not None:
            yield _point(networks[kind], label, network_color(kind), marker)


def _other(other: Results, own: Results) -> Point:
    """The searched network of another run, on the same network and device."""
    unit, own_unit = _unit(other), _unit(own)
    where = f"the run in {other.config.output!r}"
    if (unit.target, unit.unit) != (own_unit.target, own_unit.unit):
        raise UserError(
            f"{where} has costs on {unit.target} in {unit.unit}, this one on {own_unit.target} in "
            f"{own_unit.unit}; evaluate it with the same search.cost.file"
        )
    if other.architecture.backbone != own.architecture.backbone:
        raise UserError(f"{where} is about another network than this one")
    assert other.evaluation is not None
    result = other.evaluation.networks.get(SEARCHED)
    if result is None or result.cost is None:
        raise UserError(f"{where} has no searched network whose cost is known")
    return _point(result, setting(other.config), BLUE, OTHER)


def _point(result: NetworkResult, label: str, color: str, marker: str) -> Point:
    assert result.cost is not None
    error = None if result.std is None else result.std / math.sqrt(len(result.seeds))
    return Point(label, color, result.cost, result.mean, error, marker)


def setting(config: Config) -> str:
    """What tells runs apart that differ in what costs weigh."""
    cost = config.search.cost
    if cost.budget is not None:
        return f"budget {cost.budget:g}"
    return f"weight {cost.weight:g}"
