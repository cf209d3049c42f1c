"""What is measured: maps, candidates, dtypes, data and what is asked of the op."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import torch

from tests.cases import CANDIDATES, MOBILENET_V2_MAPS

MapSize = tuple[int, int, int]


class Mode(Enum):
    """What one call computes. The values stand in the tables."""

    FORWARD = "forward"
    BOTH = "forward + backward"
    X_ONLY = "forward + backward, x only"
    WEIGHTS_ONLY = "forward + backward, weights only"
    DOUBLE = "double backward"


@dataclass(frozen=True)
class Case:
    """One row of the report; every peer that suits it is measured in turn with the op.

    Args:
        size: (C, H, W) of the map.
        candidates: a key of ``tests.cases.CANDIDATES``.
        data: a key of ``tests.cases.DATA``.
        threads: None for as many as the process has.
        isa: instruction set to force; such a case needs a process of its own.
        slow_peers: whether to take half a minute for torch.compile, and for checkpointing.
    """

    size: MapSize
    mode: Mode = Mode.FORWARD
    candidates: str = "default"
    batch: int = 32
    dtype: torch.dtype = torch.float32
    data: str = "relu6"
    threads: int | None = None
    isa: str | None = None
    slow_peers: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates themselves."""
        return CANDIDATES[self.candidates]

    @property
    def elements(self) -> int:
        """Elements of the map, over the whole batch."""
        channels, height, width = self.size
        return self.batch * channels * height * width

    def __str__(self) -> str:
        parts = [
            f"{self.candidates}, {self.batch} x {' x '.join(map(str, self.size))}",
            self.mode.value,
            str(self.dtype).removeprefix("torch."),
        ]
        parts += [f"{self.data} data"] * (self.data != "relu6")
        parts += [f"{self.threads} thread{'s' * (self.threads != 1)}"] * (self.threads is not None)
        parts += [f"{self.isa} forced"] * (self.isa is not None)
        return ", ".join(parts)


LARGE, MIDDLE, LOW, SMALL = MAPS = ((96, 56, 56), (144, 28, 28), (384, 14, 14), (960, 7, 7))
assert set(MAPS) <= set(MOBILENET_V2_MAPS)
ODD = (17, 113, 57)
PLANE = (1, 1024, 1024)
QUICK_BATCH = 4

OUR_NETWORK, NO_CANDIDATES, EAGER_NETWORK = "ours", "skip_connect alone", "eager mix"
"""What the enhancers of the measured networks hold."""
PLAIN_NETWORK = "no enhancers"


def _full() -> Iterator[Case]:
    for mode in (Mode.FORWARD, Mode.BOTH):
        yield Case(LARGE, mode, slow_peers=True)
        for kind in ("avg", "max"):
            yield Case(LARGE, mode, kind)
        for size in (MIDDLE, LOW, SMALL):
            yield Case(size, mode)
        yield Case(ODD, mode, batch=1)
        for size in (LARGE, MIDDLE):
            for dtype in (torch.bfloat16, torch.float16):
                yield Case(size, mode, dtype=dtype)
            yield Case(size, mode, isa="avx2")
        yield Case(MIDDLE, mode, data="normal")
        for threads in (1, 2):
            yield Case(PLANE, mode, batch=1, threads=threads)
    yield Case(LARGE, Mode.DOUBLE)
    for mode in (Mode.X_ONLY, Mode.WEIGHTS_ONLY, Mode.DOUBLE):
        yield Case(MIDDLE, mode)
        yield Case(MIDDLE, mode, "avg")
        yield Case(MIDDLE, mode, "max")


def report_cases(quick: bool) -> list[Case]:
    """The rows of the report, in its order. ``quick``: small batches and the main ones alone."""
    if not quick:
        return list(_full())
    both = (Mode.FORWARD, Mode.BOTH)
    cases = [Case(size, mode, batch=QUICK_BATCH) for mode in both for size in MAPS]
    cases += [Case(LARGE, mode, kind, QUICK_BATCH) for mode in both for kind in ("avg", "max")]
    cases += [Case(MIDDLE, Mode.DOUBLE, batch=QUICK_BATCH), Case(ODD, batch=1)]
    return [*cases, Case(MIDDLE, batch=QUICK_BATCH, isa="avx2")]


def benchmark_cases(quick: bool) -> list[Case]:
    """The rows of ``pytest benches/``: some of the report's."""
    if quick:
        return [Case(LARGE, mode, batch=QUICK_BATCH) for mode in (Mode.FORWARD, Mode.BOTH)]
    kept = [case for case in _full() if _is_plain(case)]
    return [replace(case, slow_peers=False) if case.mode is Mode.BOTH else case for case in kept]


def _is_plain(case: Case) -> bool:
    plain = Case(case.size, case.mode, case.candidates, slow_peers=case.slow_peers)
    return case == plain and case.size in MAPS and case.mode in (Mode.FORWARD, Mode.BOTH)
