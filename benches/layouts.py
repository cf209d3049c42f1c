"""Ours beside others in both layouts: timed in turn, tabled, and written down."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benches.report import results_folder
from benches.tables import table
from benches.timing import Effort, interleave

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("forward", "forward + backward")


def medians(
    names: Mapping[str, Any], make: Callable[[str, str], Callable[[], Any]], effort: Effort
) -> dict[str, float]:
    """In ms, by "name, layout", of what ``make(name, layout)`` gives, all measured in turn."""
    runs = {f"{name}, {layout}": make(name, layout) for name in names for layout in LAYOUTS}
    return {name: 1e3 * each.median for name, each in interleave(runs, effort).items()}


def beside_ours(times: Mapping[str, float], digits: int) -> Iterator[str]:
    """A table of :func:`medians`, and how many times ours each is."""
    names = dict.fromkeys(name.rsplit(", ", 1)[0] for name in times)
    rows = []
    for name in names:
        each = [times[f"{name}, {layout}"] for layout in LAYOUTS]
        ratios = [
            f"{time / times[f'ours, {layout}']:.2f}"
            for time, layout in zip(each, LAYOUTS, strict=True)
        ]
        rows.append((name, *(f"{time:.{digits}f}" for time in each), *ratios))
    return table(("", *LAYOUTS, *(f"x ours, {layout}" for layout in LAYOUTS)), rows)


def write(
    name: str, about: Mapping[str, str], rows: list[dict[str, Any]], lines: Iterator[str]
) -> None:
    """Keep what was measured as ``name.json``, and the report as ``name.md``."""
    folder = results_folder(quick=False)
    found = {"conditions": about, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
