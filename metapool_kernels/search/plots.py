"""Pictures of a search."""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metapool_kernels.search.architecture import Architecture, Layer

COLUMNS = 4


def plot_alpha_over_epochs(
    architecture: Architecture, trajectory: Sequence[Mapping[str, Sequence[float]]]
) -> bytes:
    """Probability of each candidate over the epochs, one panel per layer.

    Args:
        architecture: the result of the search.
        trajectory: at the start and after each epoch, the softmax of alpha of the layers that
            were open then.

    Returns:
        A PNG picture.
    """
    rows = math.ceil(len(architecture.layers) / COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.2 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for layer, panel in zip(architecture.layers, panels, strict=False):
        _plot_layer(panel, layer, architecture.candidates, trajectory)
    for panel in panels[len(architecture.layers) :]:
        panel.set_axis_off()
    lines = [
        Line2D([], [], color=_color(k), linewidth=2, label=name)
        for k, name in enumerate(architecture.candidates)
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)
    figure.supxlabel("epoch", fontsize="medium")
    figure.supylabel("probability", fontsize="medium")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _plot_layer(
    panel: Axes,
    layer: Layer,
    candidates: Sequence[str],
    trajectory: Sequence[Mapping[str, Sequence[float]]],
) -> None:
    probabilities = [epoch[layer.name] for epoch in trajectory if layer.name in epoch]
    for k, name in enumerate(candidates):
        panel.plot(
            [epoch[k] for epoch in probabilities],
            color=_color(k),
            linewidth=2 if name in layer.choice else 1,
        )
    panel.axvline(layer.epoch, color="0.6", linestyle=":", linewidth=1)
    panel.set_title(f"{layer.name}: {' + '.join(layer.choice)}", fontsize="small")
    panel.grid(alpha=0.2)


def _color(k: int) -> str:
    names = list(TABLEAU_COLORS)
    return names[k % len(names)]
