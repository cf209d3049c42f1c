"""Pictures of a run over time, and of how its networks compare, as matplotlib figures."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metapool_kernels.search.report.choice_figures import BLUE, GRAY, GREEN, ORANGE, PURPLE, tidy
from metapool_kernels.search.run.controls import FIXED
from metapool_kernels.search.run.results import INHERITED, Evaluation, SearchEpoch, TrainingEpoch
from metapool_kernels.search.run.run_folder import SEARCHED

NETWORKS = {
    SEARCHED: ("searched", BLUE),
    INHERITED: ("searched, before training", BLUE),
    "none": ("without enhancers", GRAY),
    "skip": ("enhancers without pooling", "#A0A0A0"),
    "random": ("random choices", ORANGE),
    "uniform": ("uniform mix", GREEN),
}
"""What readers see of a kind of network: its name in words and its colour."""


def network_name(kind: str) -> str:
    """A kind of network in words."""
    if kind.startswith(FIXED):
        return f"{kind.removeprefix(FIXED)} everywhere"
    return NETWORKS.get(kind, (kind, PURPLE))[0]


def network_color(kind: str) -> str:
    """The colour of a kind of network."""
    return NETWORKS.get(kind, (kind, PURPLE))[1]


def step_time_figure(search: Sequence[SearchEpoch], layers: int) -> Figure:
    """Time of a step over the epochs, before the number of layers that were open.

    Args:
        search: its epochs.
        layers: how many there are.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panel = figure.subplots()
    behind = panel.twinx()
    epochs = [row.epoch for row in search]
    # An epoch's layers are those that the epoch before has left open.
    open_layers = [layers, *(layers - row.stopped for row in search[:-1])]
    behind.bar(epochs, open_layers, width=1.0, color="0.9", label="open layers")
    behind.set_ylim(0, layers * 1.05)
    behind.set_ylabel("open layers (bars)", color="0.45")
    behind.tick_params(axis="y", colors="0.45")
    behind.yaxis.set_major_locator(MaxNLocator(integer=True))
    # A line for each phase: steps that train weights alone do not compare with the others.
    for warming_up in (True, False):
        rows = [row for row in search if (row.alpha_loss is None) is warming_up]
        times = [row.step_ms for row in rows]
        panel.plot([row.epoch for row in rows], times, marker="o", markersize=4, color=BLUE)
    panel.set_ylim(0, max(row.step_ms for row in search) * 1.1)
    panel.set_ylabel("mean time of a step in ms (line)", color=BLUE)
    panel.tick_params(axis="y", colors=BLUE)
    panel.set_xlabel("epoch of the search")
    panel.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    # The line has to lie before the bars, whose axis is the second.
    panel.set_zorder(behind.get_zorder() + 1)
    panel.patch.set_visible(False)
    _mark_warmup(panel, search)
    for axes in (panel, behind):
        axes.spines["top"].set_visible(False)
    return figure


def _mark_warmup(panel: Axes, search: Sequence[SearchEpoch]) -> None:
    """A line where alpha begins to be trained; steps before it train weights only."""
    first = next((row.epoch for row in search if row.alpha_loss is not None), None)
    if first is not None and first > search[0].epoch:
        panel.axvline(first - 0.5, color="0.4", linestyle="--", linewidth=1)
        panel.annotate(
            "alpha from here on",
            (first - 0.5, 1.0),
            xytext=(4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize="small",
            color="0.3",
            va="top",
        )


def cost_figure(search: Sequence[SearchEpoch]) -> Figure:
    """Expected cost over the epochs of a search, and the weight of one unit of it."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panel = figure.subplots()
    behind = panel.twinx()
    epochs = [row.epoch for row in search]
    for axes, column, color, marker, label in (
        (panel, "expected_cost", BLUE, "o", "expected cost (skip_connect: 1)"),
        (behind, "cost_weight", ORANGE, "s", "weight of one unit of it"),
    ):
        numbers = [getattr(row, column) for row in search]
        axes.plot(epochs, numbers, color=color, marker=marker, markersize=4)
        axes.set_ylabel(label, color=color)
        axes.tick_params(axis="y", colors=color)
        axes.spines["top"].set_visible(False)
    behind.set_ylim(bottom=0)
    panel.set_xlabel("epoch of the search")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def training_figure(
    search: Sequence[SearchEpoch], training: Mapping[str, Sequence[Sequence[TrainingEpoch]]]
) -> Figure:
    """Loss and accuracy over the epochs: of both halves in the search, then of each network.

    Args:
        search: its epochs.
        training: those of each network trained afterwards, by kind, one list for each seed; each
            line is their mean. Without any there is the search alone.
    """
    rows = 2 if training else 1
    figure = Figure(figsize=(10, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    _draw_search(panels[0], search)
    if training:
        _draw_training(panels[1], training)
    for left, right in panels:
        left.set_ylabel("loss")
        left.set_ylim(bottom=0)
        right.set_ylabel("accuracy in %")
        for panel in (left, right):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.legend(frameon=False, fontsize="small")
            tidy(panel)
    return figure


def _draw_search(panels: Sequence[Axes], search: Sequence[SearchEpoch]) -> None:
    training = [row for row in search if row.loss is not None]
    learning = [row for row in search if row.alpha_loss is not None]
    for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
        for rows, column, label, color, marker in (
            (training, name, "weight half", BLUE, "o"),
            (learning, f"alpha_{name}", "alpha half", ORANGE, "s"),
        ):
            panel.plot(
                [row.epoch for row in rows],
                [getattr(row, column) for row in rows],
                color=color,
                marker=marker,
                markersize=4,
                label=label,
            )
        panel.set_xlabel("epoch of the search")


def _draw_training(
    panels: Sequence[Axes], training: Mapping[str, Sequence[Sequence[TrainingEpoch]]]
) -> None:
    for kind in in_order(training):
        epochs = list(zip(*training[kind], strict=False))
        for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
            panel.plot(
                [seeds[0].epoch for seeds in epochs],
                [fmean(getattr(row, name) for row in seeds) for seeds in epochs],
                color=network_color(kind),
                linewidth=2.5 if kind == SEARCHED else 1.5,
                label=network_name(kind),
            )
    for panel in panels:
        panel.set_xlabel("epoch of the training after the search")


def controls_figure(evaluation: Evaluation) -> Figure:
    """Accuracy of each network on the evaluation split: a dot for each seed, mean and spread."""
    kinds = in_order(evaluation.networks)
    figure = Figure(figsize=(8, 0.65 * len(kinds) + 1.1), layout="constrained")
    panel = figure.subplots()
    for row, kind in enumerate(kinds):
        result = evaluation.networks[kind]
        color = network_color(kind)
        accuracies = [seed.accuracy for seed in result.seeds.values()]
        panel.plot(
            *(accuracies, [row] * len(accuracies)),
            linestyle="none",
            marker="o",
            markersize=7,
            color=color,
            alpha=0.55,
            markeredgewidth=0,
        )
        spread = result.std if len(accuracies) > 1 else None
        panel.errorbar(
            *(result.mean, row + 0.24),
            xerr=spread,
            marker="D",
            markersize=6,
            color=color,
            capsize=4,
            linewidth=2,
        )
        panel.annotate(
            spread_text(result.mean, spread),
            (1.02, row),
            xycoords=("axes fraction", "data"),
            va="center",
        )
    panel.set_yticks(range(len(kinds)), [network_name(kind) for kind in kinds])
    panel.set_ylim(len(kinds) - 0.4, -0.5)
    panel.margins(x=0.08)
    panel.set_xlabel(
        f"accuracy on {evaluation.images} held-out images in %   "
        "(circle: one seed; diamond: mean and standard deviation)"
    )
    tidy(panel)
    return figure


def spread_text(mean: float, std: float | None) -> str:
    """A mean and its standard deviation in words; percent."""
    return f"{mean:.2f} %" if std is None else f"{mean:.2f} ± {std:.2f} %"


def in_order(kinds: Mapping[str, object]) -> list[str]:
    """The searched network first, then its controls as :data:`NETWORKS` has them."""
    known = [kind for kind in NETWORKS if kind in kinds]
    return known + [kind for kind in kinds if kind not in NETWORKS]
