"""How long networks take, one beside the other."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

SAMPLE = 2e-3
"""Seconds that one sample takes at least: as many runs as that needs count together."""


class Latency(NamedTuple):
    """Seconds of one run: median and quartiles over the samples."""

    median: float
    lower: float
    upper: float


def interleaved(runs: Mapping[str, Callable[[], object]], samples: int) -> dict[str, Latency]:
    """Time several things in turns, so that what disturbs the machine meets all of them.

    Args:
        runs: what is timed, by name; each is called a few times first.
        samples: of each.
    """
    counts = {name: _count(run) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(samples):
        # Forward and backward by turns: what comes after a large one finds cold caches.
        names = list(runs) if turn % 2 == 0 else list(reversed(list(runs)))
        for name in names:
            taken[name].append(_seconds(runs[name], counts[name]) / counts[name])
    return {name: _summary(seconds) for name, seconds in taken.items()}


def _count(run: Callable[[], object]) -> int:
    run()
    # What interrupts the one run that is looked at would leave samples of a single one.
    seconds, count = min(_seconds(run, 1) for _ in range(3)), 1
    while seconds < SAMPLE:
        count = max(2 * count, int(count * SAMPLE / max(seconds, 1e-9)))
        seconds = _seconds(run, count)
    return count


def _seconds(run: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        run()
    return time.perf_counter() - started


def _summary(seconds: list[float]) -> Latency:
    if len(seconds) == 1:
        return Latency(*seconds * 3)
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Latency(median, lower, upper)
