"""The report's picture: peers on one large map, and the speed-up over all map sizes."""

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benches.cases import LARGE, MAPS, Mode
from benches.measure import Result
from benches.peers import COPY, EAGER, OURS

_COLOURS = {"ours": "#1b6ca8", "ours channels_last": "#62a8d9"}
_OTHERS = "#b0b0b0"


def _plain(results: list[Result], mode: Mode) -> list[Result]:
    """The default candidates on float32 maps as after ReLU6, without anything forced."""
    return [
        result
        for result in results
        if result.case.mode is mode
        and (result.case.candidates, result.case.data) == ("default", "relu6")
        and result.case.dtype is torch.float32
        and (result.case.isa, result.case.threads) == (None, None)
        and result.case.size in MAPS
    ]


def _draw_bars(axes: Axes, result: Result) -> None:
    times = {name: value for name, value in result.times.items() if name != COPY}
    names = sorted(times, key=lambda name: times[name].median)
    medians = [times[name].median * 1e3 for name in names]
    low = [(times[name].median - times[name].q1) * 1e3 for name in names]
    high = [(times[name].q3 - times[name].median) * 1e3 for name in names]
    colours = [_COLOURS.get(name, _OTHERS) for name in names]
    axes.barh(names, medians, xerr=(low, high), color=colours, ecolor="#505050")
    for position, median in enumerate(medians):
        axes.annotate(
            f"{median:.3g}", (medians[position], position), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    copy = result.times[COPY].median * 1e3
    axes.axvline(copy, color="#c0392b", linestyle="--", label=f"copy of x, {copy:.3g} ms")
    axes.set_xscale("log")
    axes.set_xlim(copy / 2, max(medians) * 3)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds (log), median and quartiles")
    axes.set_title(str(result.case), fontsize=9)
    axes.legend(loc="upper right", fontsize=8)


def _draw_speed_ups(axes: Axes, results: list[Result]) -> None:
    for mode, line in ((Mode.FORWARD, "-"), (Mode.BOTH, "--")):
        plain = _plain(results, mode)
        for name in OURS:
            found = [result for result in plain if {name, EAGER} <= result.times.keys()]
            sizes = [" x ".join(map(str, result.case.size)) for result in found]
            ratios = [r.times[EAGER].median / r.times[name].median for r in found]
            label = f"{name}, {mode.value}"
            axes.plot(sizes, ratios, line, marker="o", color=_COLOURS[name], label=label)
    axes.set_yscale("log")
    axes.set_ylabel("times faster than eager NCHW (log)")
    axes.set_title("default candidates, float32", fontsize=9)
    axes.grid(axis="y", which="both", alpha=0.3)
    axes.legend(fontsize=8)


def draw(results: list[Result], target: Path) -> None:
    """Write the picture."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for result in _plain(results, Mode.FORWARD):
        if result.case.size == LARGE:
            _draw_bars(left, result)
    _draw_speed_ups(right, results)
    figure.savefig(target, dpi=130)
    plt.close(figure)
