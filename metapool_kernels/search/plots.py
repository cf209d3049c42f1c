"""Pictures of a search."""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

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
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    for layer, panel in zip(architecture.layers, panels, strict=False):
        _plot_layer(panel, layer, architecture.candidates, trajectory)
    for panel in list(panels)[len(architecture.layers) :]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
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
    colors = list(TABLEAU_COLORS)
    for k, name in enumerate(candidates):
        panel.plot(
            [epoch[k] for epoch in probabilities],
            label=name,
            color=colors[k % len(colors)],
            linewidth=2 if name in layer.choice else 1,
        )
    panel.axvline(layer.epoch, color="0.6", linestyle=":", linewidth=1)
    panel.set_title(f"{layer.name}: {' + '.join(layer.choice)}", fontsize="small")
    panel.grid(alpha=0.2)
