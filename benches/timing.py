"""Measuring in turn: a slow minute of a shared machine then hits ours and all peers alike."""

import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
CALLS_IN_A_TURN, TURN_S = 5, 0.05


def keep_memory() -> str:
    """Have glibc keep what is freed, and say what the allocator does now.

    By default it takes every large block from the system and gives it back: then each call pays
    for page faults over its whole output, which measures the kernel and not the op.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as it is (not glibc)"
    libc = ctypes.CDLL(None)
    if libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1):
        return "glibc, freed memory is kept (M_MMAP_MAX=0, M_TRIM_THRESHOLD=2 GiB)"
    return "as it is (mallopt refused)"


@dataclass(frozen=True)
class Times:
    """Median and quartiles, in seconds, and of how many calls."""

    median: float
    q1: float
    q3: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        """From the time of each call."""
        q1, median, q3 = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
        return cls(median, q1, q3, len(seconds))


@dataclass(frozen=True)
class Effort:
    """How long to measure: until the time is up, but at least and at most so many rounds."""

    seconds: float = 4.0
    least: int = 3
    most: int = 20


QUICK = Effort(seconds=1.0, least=2, most=10)


def interleave(runs: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, Times]:
    """Time all ``runs`` in turn, A B C A B C, after one round that does not count.

    A turn is one call, or several where they are short: the slow ones set the number of rounds,
    and one call a round would leave the fast ones with few samples. The result of a call lives
    until the next one of the same turn, as in use.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began, rounds = time.perf_counter(), 0
    while rounds < effort.least or (
        rounds < effort.most and time.perf_counter() - began < effort.seconds
    ):
        for name, run in runs.items():
            turn = 0.0
            for _ in range(CALLS_IN_A_TURN):
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
                seconds[name].append(took)
                turn += took
                if turn > TURN_S:
                    break
        rounds += 1
    return {name: Times.of(taken) for name, taken in seconds.items()}
