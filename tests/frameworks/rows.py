"""What a framework's poolings do, found by running them: one row of the page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGE = Path(__file__).parents[2] / "metapool_kernels" / "devices" / "frameworks.md"

Map = NDArray[np.float32]

COLUMNS = (
    "",
    "tie gradient",
    "NaN in the window of a maximum",
    "its gradient",
    "map of -Inf: maximum",
    "its gradient",
    "padding counted",
    'stride-2 "same" starts at',
    "bf16 / f16 average",
    "ceil mode",
    "default stride",
    "adaptive 7 to 5",
)
NONE = "-"
TIES = [[4, 2, 0], [2, 1, 0], [0, 0, 0]]
"""Gradient of the sum where the first of equal elements takes all: windows of 3, stride 1."""


class Framework(NamedTuple):
    """Poolings of maps (H, W), padded by half the window, as the framework does by default.

    Attributes:
        name: with the version.
        maximum: of a map, windows of 3 x 3, stride 1.
        gradient: of the sum of these, in the map.
        average: of a map in a dtype, by its name, as float32; window, stride 1.
        same: maxima 3 x 3 of a map at stride 2, by the framework's own "same", or its nearest word.
        ceil: averages of a row, unpadded, with ceil mode; window, stride.
        strideless: maxima 2 x 2 of a map, unpadded, without a word on the stride.
        adaptive: averages of a row in so many bins.
    """

    name: str
    maximum: Callable[[Map], Any]
    gradient: Callable[[Map], Any]
    average: Callable[[Map, int, str], Any]
    same: Callable[[Map], Any] | None = None
    ceil: Callable[[Map, int, int], Any] | None = None
    strideless: Callable[[Map], Any] | None = None
    adaptive: Callable[[Map, int], Any] | None = None


def print_and_compare(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Print a table; how many of its rows are not on the page so."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (columns, *rows)]
    print(*lines, sep="\n")
    return len(set(lines) - set(PAGE.read_text().splitlines()))


def row(framework: Framework) -> list[str]:
    """A cell for each of :data:`COLUMNS`."""
    infinite = np.full((3, 3), -np.inf, np.float32)
    return [
        framework.name,
        _ties(framework),
        _nan(framework),
        _nan_gradient(framework),
        number(_try(framework.maximum, infinite, at=(1, 1))),
        _gradient_of_infinite(framework, infinite),
        _counted(framework),
        _start(framework),
        f"{_low(framework, 'bfloat16', 8)} / {_low(framework, 'float16', 11)}",
        _ceil(framework),
        _default_stride(framework),
        _adaptive(framework),
    ]


def _try(function: Callable[..., Any], *arguments: Any, at: Any = ...) -> Any:
    """What a framework gives, as float32, or None where it has no such thing."""
    try:
        return np.asarray(function(*arguments), np.float32)[at]
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError):
        return None


def number(value: Any) -> str:
    """As the page writes it."""
    if value is None:
        return NONE
    return {np.inf: "Inf", -np.inf: "-Inf"}.get(float(value), f"{value:.4g}")


def _matrix(values: Any) -> str:
    return str([[round(float(value), 3) for value in line] for line in values]).replace(".0", "")


def _ties(framework: Framework) -> str:
    found = framework.gradient(np.zeros((3, 3), np.float32))
    if np.array_equal(found, TIES):
        return "first"
    return "shared" if np.sum(found) == 9 else _matrix(found)


def _nan(framework: Framework) -> str:
    image = np.zeros((7, 7), np.float32)
    image[3, 3] = np.nan
    said = fate(np.isnan(framework.maximum(image))[2:5, 2:5])
    if said == "spreads":
        return said
    image[2, 2] = 5  # before the NaN in the window of both
    return said + ("" if np.nan_to_num(framework.maximum(image))[3, 3] == 5 else ", hides a 5")


def fate(visible: NDArray[np.bool_]) -> str:
    """What becomes of a NaN, from the square of the windows that hold it, one output for each."""
    if visible.all():
        return "spreads"
    if not visible.any():
        return "dropped"
    if visible.sum() == 1 and visible[-1, -1]:
        return "stays if first"
    return "stays if last" if visible.sum() == 1 and visible[0, 0] else f"{visible.sum()} stay"


def _nan_gradient(framework: Framework) -> str:
    image = np.zeros((5, 5), np.float32)
    image[2, 2] = np.nan
    found = framework.gradient(image)
    if np.isnan(found).any():
        return f"{np.isnan(found).sum()} NaN"
    total = np.sum(found)
    lost = "" if total == 25 else f", {25 - total:g} of 25 lost"
    if found[2, 2] == 9:
        return "to the NaN" + lost
    zero = framework.gradient(np.zeros((5, 5), np.float32))
    return ("as if 0" if np.array_equal(found, zero) else f"{found[2, 2]:g} of 9 to it") + lost


def _gradient_of_infinite(framework: Framework, infinite: Map) -> str:
    found = framework.gradient(infinite)
    if np.array_equal(found, framework.gradient(np.zeros((3, 3), np.float32))):
        return "as ties"
    return "0" if not np.any(found) else f"{np.sum(found):.3g} of 9, rest lost"


def _counted(framework: Framework) -> str:
    corner = float(framework.average(np.ones((4, 4), np.float32), 3, "float32")[0, 0])
    return {0.4444: "yes", 1.0: "no"}.get(round(corner, 4), f"{corner:.4g}")


def _start(framework: Framework) -> str:
    if framework.same is None:
        return NONE
    image = np.arange(36, dtype=np.float32).reshape(6, 6)
    return {14: "0", 7: "-1"}[int(framework.same(image)[0, 0])]


def _low(framework: Framework, dtype: str, bits: int) -> str:
    """The worst relative error of a 15 x 15 average of positive numbers that the dtype has."""
    noise = np.random.default_rng(0).integers(1, 129, (16, 15, 15)) / 128
    even = np.broadcast_to(np.arange(1, 33)[:, None, None] / 32, (32, 15, 15))
    images = np.concatenate([noise, even]).astype(np.float32)
    truth = images.mean((1, 2), dtype=np.float64)
    found = [_try(framework.average, image, 15, dtype, at=(7, 7)) for image in images]
    if any(value is None for value in found):
        return NONE
    error = float(np.max(np.abs(np.array(found) - truth) / truth))
    said = "exact" if error <= 1.01 * 2.0**-bits else f"{error:.1%}"
    large = _try(framework.average, np.full((15, 15), 30000, np.float32), 15, dtype, at=(7, 7))
    return said + (", overflows" if np.isinf(large) else "")


def _ceil(framework: Framework) -> str:
    if framework.ceil is None:
        return NONE
    overhang = _try(framework.ceil, np.arange(1, 5, dtype=np.float32), 3, 2)
    behind = _try(framework.ceil, np.arange(1, 6, dtype=np.float32), 2, 5)
    if overhang is None:
        return NONE
    divided = "divides by what is there" if overhang[-1] == 3.5 else f"[2, {overhang[-1]:.4g}]"
    if behind is None:
        return f"{divided}; refuses windows behind the map"
    return divided + ("" if len(behind) == 1 else f"; a window behind the map: {behind[-1]:g}")


def _default_stride(framework: Framework) -> str:
    if framework.strideless is None:
        return NONE
    size = np.shape(framework.strideless(np.zeros((6, 6), np.float32)))[0]
    return {3: "window", 5: "1"}[size]


def _adaptive(framework: Framework) -> str:
    if framework.adaptive is None:
        return NONE
    found = _try(framework.adaptive, np.arange(7, dtype=np.float32), 5)
    return NONE if found is None else str([round(float(x), 2) for x in found]).replace(".0", "")
