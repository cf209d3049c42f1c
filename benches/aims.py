"""What the CPU kernels aim at, as ratios in one run, and what a run shows of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from benches.cases import (
    LARGE,
    LOW,
    MIDDLE,
    NO_CANDIDATES,
    OUR_NETWORK,
    PLANE,
    SMALL,
    Case,
    Mode,
)
from benches.figures import Row, rows
from benches.measure import Result
from benches.peers import OURS
from benches.timing import Times

STEP_AIM = 1.10
MEMORY_AIM = 0.1

_Ratio = Callable[[Row], float | None]


def _copies(row: Row) -> float | None:
    return row.copies


def _over_best(row: Row) -> float | None:
    return row.over_best


def _over_eager(row: Row) -> float | None:
    return row.over_eager


def _over_poolings(row: Row) -> float | None:
    return row.over_poolings


@dataclass(frozen=True)
class Bound:
    """A bound on one ratio of our NCHW figures in one case: at most ``value``, or at least."""

    case: Case
    what: str
    ratio: _Ratio
    value: float
    at_most: bool = False


BOUNDS = (
    Bound(Case(LARGE, slow_peers=True), "copies", _copies, 3.5, at_most=True),
    Bound(Case(LARGE, slow_peers=True), "times the best torch peer", _over_best, 20),
    Bound(Case(LARGE, slow_peers=True), "times eager NCHW", _over_eager, 150),
    Bound(Case(LARGE, slow_peers=True), "times OpenCV without the mix", _over_poolings, 6),
    Bound(Case(LARGE, Mode.BOTH, slow_peers=True), "times the best torch peer", _over_best, 20),
    Bound(Case(LARGE, Mode.BOTH, slow_peers=True), "times eager NCHW", _over_eager, 60),
    Bound(Case(LARGE, candidates="avg"), "copies", _copies, 2, at_most=True),
    Bound(Case(LARGE, candidates="avg"), "times the best torch peer", _over_best, 1),
    Bound(Case(LOW), "times eager NCHW", _over_eager, 150),
    Bound(Case(LOW, Mode.BOTH), "times eager NCHW", _over_eager, 60),
    Bound(Case(SMALL), "times eager NCHW", _over_eager, 100),
    Bound(Case(SMALL, Mode.BOTH), "times eager NCHW", _over_eager, 50),
    Bound(Case(LARGE, Mode.DOUBLE), "times eager NCHW", _over_eager, 20),
)


@dataclass(frozen=True)
class Aim:
    """One aim, what was measured, and whether it holds."""

    what: str
    bound: str
    measured: str
    met: bool


def _at_most(what: str, bound: float, measured: float) -> Aim:
    return Aim(what, f"at most {bound:g}", f"{measured:.2f}", measured <= bound)


def _bounds(results: list[Result]) -> Iterator[Aim]:
    ours = {row.case: row for row in rows(results) if row.name == OURS[0]}
    for bound in BOUNDS:
        ratio = bound.ratio(ours[bound.case]) if bound.case in ours else None
        if ratio is None:
            continue
        what = f"{bound.case}: {bound.what}"
        if bound.at_most:
            yield _at_most(what, bound.value, ratio)
        else:
            yield Aim(what, f"at least {bound.value:g}", f"{ratio:.1f}", ratio >= bound.value)


def _against_ourselves(results: list[Result]) -> Iterator[Aim]:
    """Layouts, dtypes, instruction sets and threads against our own figures."""
    times = {result.case: result.times for result in results}
    for case, measured in times.items():
        nchw, last = (measured.get(name) for name in OURS)
        if nchw and last and case.size in (LARGE, LOW, SMALL) and case.batch > 1:
            ratio = last.median / nchw.median
            yield _at_most(f"{case}: channels_last over NCHW", 1.2, ratio)

    def over(what: str, case: Case, base: Case, bound: float) -> Iterator[Aim]:
        if OURS[0] in times.get(case, {}) and OURS[0] in times.get(base, {}):
            ratio = times[case][OURS[0]].median / times[base][OURS[0]].median
            yield _at_most(f"{case}: {what}", bound, ratio)

    for mode in (Mode.FORWARD, Mode.BOTH):
        for size in (LARGE, MIDDLE):
            base = Case(size, mode, slow_peers=size == LARGE)
            for dtype in (torch.bfloat16, torch.float16):
                yield from over("over float32", Case(size, mode, dtype=dtype), base, 1)
            yield from over("over AVX-512", Case(size, mode, isa="avx2"), base, 2)
        one, two = (Case(PLANE, mode, batch=1, threads=count) for count in (1, 2))
        yield from over("over one thread", two, one, 1 / 1.7)


def aims(
    results: list[Result],
    network: Mapping[str, Times],
    memory: Mapping[str, Mapping[str, float]],
) -> list[Aim]:
    """Every aim that this run measured."""
    step = network[OUR_NETWORK].median / network[NO_CANDIDATES].median
    most = max(value for name in OURS for value in memory[name].values())
    wrong = sum(name in OURS for result in results for name in result.withheld)
    return [
        *_bounds(results),
        *_against_ourselves(results),
        _at_most("training step over that with skip_connect alone", STEP_AIM, step),
        _at_most("peak memory beyond x, out and gradients, in maps, any K", MEMORY_AIM, most),
        Aim("cases in which ours is wrong", "0", str(wrong), not wrong),
    ]
