"""What is read out of the times: ratios, and how far the machine's limits are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from benches.cases import Case, Mode
from benches.conditions import LANES, clock_ghz
from benches.measure import Result
from benches.peers import COPY, EAGER, OURS, is_torch_peer
from benches.timing import Times
from metapool_kernels import numpy_api

OPENCV, POOLINGS = "OpenCV", "OpenCV, poolings alone"
_MAPS_MOVED = {Mode.FORWARD: 2, Mode.BOTH: 5}
"""With perfect reuse: x read, out written; then x and grad_out read, grad_x written."""


@dataclass(frozen=True)
class Row:
    """One of our layouts in one case; ratios above one say how many times faster ours is."""

    case: Case
    name: str
    times: Times
    copies: float
    over_eager: float | None
    over_best: float | None
    best: str | None
    over_opencv: float | None
    over_poolings: float | None


def best_torch_peer(times: Mapping[str, Times]) -> str | None:
    """The fastest peer in PyTorch, in either layout."""
    peers = [name for name in times if is_torch_peer(name)]
    return min(peers, key=lambda name: times[name].median, default=None)


def rows(results: list[Result]) -> Iterator[Row]:
    """The table of ours, case by case."""
    for result in results:
        best = best_torch_peer(result.times)
        for name in OURS:
            if name in result.times:
                yield _row(result, name, best)


def _row(result: Result, name: str, best: str | None) -> Row:
    times, mine = result.times, result.times[name]

    def over(peer: str | None) -> float | None:
        return times[peer].median / mine.median if peer in times else None

    copies = mine.median / times[COPY].median
    ratios = (over(peer) for peer in (OPENCV, POOLINGS))
    return Row(result.case, name, mine, copies, over(EAGER), over(best), best, *ratios)


@dataclass(frozen=True)
class Roofline:
    """How close one of our layouts comes to moving its bytes at the speed of the copy."""

    case: Case
    name: str
    bytes_per_element: int
    copy_gb_s: float
    ours_gb_s: float
    share: float
    ns_per_vector: float
    cycles_per_vector: float | None


def rooflines(results: list[Result]) -> Iterator[Roofline]:
    """For forward and forward + backward, each with the instruction set that it ran on."""
    clock = clock_ghz()
    for result in results:
        case, times = result.case, result.times
        if case.mode not in _MAPS_MOVED:
            continue
        size = case.dtype.itemsize
        moved = _MAPS_MOVED[case.mode] * size
        copy_speed = 2 * size * case.elements / times[COPY].median / 1e9
        vectors = case.elements / LANES[case.isa or numpy_api.active_isa()]
        threads = case.threads or torch.get_num_threads()
        for name in OURS:
            if name not in times:
                continue
            speed = moved * case.elements / times[name].median / 1e9
            nanoseconds = times[name].median * threads / vectors * 1e9
            cycles = None if clock is None else nanoseconds * clock
            yield Roofline(
                case, name, moved, copy_speed, speed, speed / copy_speed, nanoseconds, cycles
            )
