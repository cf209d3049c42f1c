"""Pictures of what was chosen, as matplotlib figures; those over time are in ``run_figures.py``."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from metapool_kernels.candidates import Kind, parse_candidate
from metapool_kernels.search.networks.architecture import Architecture, Layer

COLUMNS = 4
"""Panels side by side in the picture of alpha."""

# Okabe and Ito's colours, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959"

Color = tuple[float, float, float]


def png(figure: Figure) -> bytes:
    """A figure as a PNG picture."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


def tidy(panel: Axes) -> None:
    """Leave the lines that help reading, and no others."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.set_axisbelow(True)


def alpha_figure(
    architecture: Architecture, trajectory: Sequence[Mapping[str, Sequence[float]]]
) -> Figure:
    """Probability of each candidate over the epochs, one panel per layer.

    Args:
        architecture: the result of the search.
        trajectory: at the start and after each epoch, the softmax of alpha of the layers that
            were open then.
    """
    layers = architecture.layers
    columns = min(COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(3.1 * COLUMNS, 1.9 * rows + 1.2), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    colors = candidate_colors(architecture)
    for layer, panel in zip(layers, panels, strict=False):
        _draw_layer(panel, layer, colors, trajectory)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(layers) - columns) : len(layers)]:
        panel.tick_params(labelbottom=True)
    panels[0].set_ylim(bottom=0)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    lines = [
        Line2D([], [], color=color, linewidth=2.5, label=name) for name, color in colors.items()
    ]
    lines.append(Line2D([], [], color="0.5", linestyle=":", label="layer stopped"))
    figure.legend(
        handles=lines,
        loc="outside upper center",
        ncols=math.ceil(len(lines) / math.ceil(len(lines) / 6)),
        frameon=False,
    )
    figure.supxlabel("epoch", fontsize="medium")
    figure.supylabel("probability (softmax of alpha)", fontsize="medium")
    return figure


def _draw_layer(
    panel: Axes,
    layer: Layer,
    colors: Mapping[str, Color],
    trajectory: Sequence[Mapping[str, Sequence[float]]],
) -> None:
    probabilities = [epoch[layer.name] for epoch in trajectory if layer.name in epoch]
    for k, (name, color) in enumerate(colors.items()):
        chosen = name in layer.choice
        panel.plot(
            [epoch[k] for epoch in probabilities],
            color=color,
            linewidth=2.8 if chosen else 1.1,
            zorder=3 if chosen else 2,
            label=name,
        )
    panel.axvline(layer.epoch, color="0.5", linestyle=":", linewidth=1.2)
    panel.set_title(f"{layer.name}\n{' + '.join(layer.choice)}", fontsize="small", loc="left")
    tidy(panel)


def candidate_colors(architecture: Architecture) -> dict[str, Color]:
    """A colour for each candidate: the hue tells the kind, the depth the size of the window."""
    parsed = {name: parse_candidate(name) for name in architecture.candidates}
    colors: dict[str, Color] = {}
    for kind, shades in ((Kind.MAX, "Oranges"), (Kind.AVG, "Blues")):
        names = [name for name, candidate in parsed.items() if candidate.kind is kind]
        names.sort(key=lambda name: parsed[name].kh * parsed[name].kw)
        colors |= _shades(names, shades)
    colors |= _shades([name for name, c in parsed.items() if c.kind is Kind.SKIP], "Greys")
    colors |= {name: (0.7, 0.7, 0.7) for name, c in parsed.items() if c.kind is Kind.NONE}
    colors |= _shades(architecture.extra_candidates, "Greens")
    return {name: colors[name] for name in (*parsed, *architecture.extra_candidates)}


def _shades(names: Sequence[str], colormap: str) -> dict[str, Color]:
    depths = np.linspace(0.45, 0.95, len(names)) if len(names) != 1 else [0.85]
    return {name: colormaps[colormap](depth)[:3] for name, depth in zip(names, depths, strict=True)}


def heat_map_figure(architecture: Architecture) -> Figure:
    """Probability of each candidate in each layer, by the alpha with which the layer stopped."""
    layers = architecture.layers
    candidates = [*architecture.candidates, *architecture.extra_candidates]
    alpha = np.array([layer.alpha for layer in layers])
    exponents = np.exp(alpha - alpha.max(1, keepdims=True))
    probabilities = exponents / exponents.sum(1, keepdims=True)
    figure = Figure(
        figsize=(1.05 * len(candidates) + 3.5, max(0.32 * len(layers) + 1.6, 2.6)),
        layout="constrained",
    )
    panel = figure.subplots()
    top = probabilities.max()
    image = panel.imshow(probabilities, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for row, layer in enumerate(layers):
        for column, name in enumerate(candidates):
            chosen = name in layer.choice
            panel.text(
                column,
                row,
                f"{probabilities[row, column]:.2f}",
                ha="center",
                va="center",
                fontsize="small",
                fontweight="bold" if chosen else "normal",
                color="white" if probabilities[row, column] > 0.6 * top else "0.2",
            )
            if chosen:
                corner = (column - 0.46, row - 0.42)
                panel.add_patch(
                    Rectangle(corner, 0.92, 0.84, fill=False, edgecolor=ORANGE, linewidth=2)
                )
    panel.set_yticks(range(len(layers)), [_with_map_size(layer) for layer in layers])
    panel.set_xticks(range(len(candidates)), candidates)
    panel.tick_params(length=0, labelsize="small", top=False, labeltop=True, labelbottom=False)
    panel.spines[:].set_visible(False)
    frame = Rectangle((0, 0), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2)
    frame.set_label("chosen when the layer stopped")
    figure.legend(handles=[frame], loc="outside lower center", frameon=False)
    figure.colorbar(image, label="probability", pad=0.02)
    return figure


def _with_map_size(layer: Layer) -> str:
    return f"{layer.name}  ({layer.map_size[0]} x {layer.map_size[1]})"


def receptive_field_figure(
    architecture: Architecture,
    searched: Mapping[str, tuple[int, int]],
    plain: Mapping[str, tuple[int, int]],
) -> Figure:
    """Receptive field behind each layer, in the order in which the network runs.

    Args:
        architecture: the result of the search.
        searched: height and width in the network that was found, by layer.
        plain: likewise in the network without enhancers.
    """
    layers = architecture.layers
    _, *image = architecture.backbone.image_shape
    square = image[0] == image[1] and all(
        side[0] == side[1] for fields in (searched, plain) for side in fields.values()
    )
    figure = Figure(
        figsize=(9 if square else 13, max(0.32 * len(layers) + 1.8, 3)), layout="constrained"
    )
    panels = figure.subplots(1, 1 if square else 2, sharey=True, squeeze=False)[0]
    for axis, panel in enumerate(panels):
        _draw_fields(
            panel,
            [plain[layer.name][axis] for layer in layers],
            [searched[layer.name][axis] for layer in layers],
            image[axis],
        )
        side = "side" if square else ("height", "width")[axis]
        panel.set_xlabel(f"receptive field of the centre unit: {side} in pixels")
    panels[0].set_yticks(
        range(len(layers)), [f"{layer.name}:  {' + '.join(layer.choice)}" for layer in layers]
    )
    panels[0].tick_params(axis="y", labelsize="small", length=0)
    panels[0].set_ylim(len(layers) - 0.4, -0.6)
    panels[0].set_ylabel("layers, from input to output")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw_fields(panel: Axes, plain: Sequence[int], searched: Sequence[int], image: int) -> None:
    rows = range(len(plain))
    panel.hlines(rows, plain, searched, color=BLUE, alpha=0.35, linewidth=4)
    panel.plot(
        *(plain, rows),
        linestyle="none",
        marker="o",
        markersize=8,
        markerfacecolor="white",
        markeredgecolor=GRAY,
        label="without enhancers",
    )
    panel.plot(
        *(searched, rows), linestyle="none", marker="o", markersize=6, color=BLUE, label="searched"
    )
    panel.axvline(image, color="0.5", linestyle="--", linewidth=1, zorder=1, label="whole image")
    panel.set_xlim(0, max(image, *plain, *searched) * 1.04)
    tidy(panel)
