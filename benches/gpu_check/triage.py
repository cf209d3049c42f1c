"""What is broken at all: each backend, dtype and layout against the definition in float64."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benches.cases import Case, Mode
from benches.gpu_check.device import prepare
from benches.gpu_check.figures import BATCH, GPU_BACKENDS, Measured
from benches.gpu_check.worker import Row, WrongNumbersError, work
from benches.gpu_model import MAPS
from benches.measure import problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rows(backend: str, tiny: bool, small: bool = False) -> list[Measured]:
    """Those of one backend: what most people use first; of ``small`` maps alone for a sanitizer.

    The calls are those of the figures, so that they need few kernels more.
    """
    if tiny:
        return list(_rows(backend, [(2, 5)], DTYPES[:2], batch=2))
    return list(_rows(backend, list(MAPS[2:] if small else MAPS), DTYPES, BATCH))


def _rows(
    backend: str, maps: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype], batch: int
) -> Iterator[Measured]:
    for dtype in dtypes:
        # The rarer dtypes take one map: each is a kernel more to compile.
        for channels, side in maps if dtype in DTYPES[:2] else maps[-1:]:
            for last in (False, True):
                case = Case((channels, side, side), Mode.BOTH, batch=batch, dtype=dtype)
                yield Measured(case, last, backend)
    channels, side = maps[-1]
    yield Measured(Case((channels, side, side), Mode.DOUBLE, batch=batch), False, backend)


def check(row: Measured, device: str) -> dict[str, Any]:
    """The output and all gradients, on data with ties and without.

    Raises:
        WrongNumbersError: they are off.
    """
    for data in ("relu6", "normal"):
        wrong = problem(replace(row.case, data=data), row.peer, device)
        if wrong is not None:
            raise WrongNumbersError(f"{data} data: {wrong}")
    return {"right": True}


def main() -> None:
    """Check all rows of a backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=GPU_BACKENDS)
    parser.add_argument("--small", action="store_true", help="small maps alone")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    prepare(arguments.device)

    def of(row: Measured) -> Row:
        return str(row), lambda: check(row, arguments.device)

    is_rehearsal = arguments.device == "cpu"
    work(of(row) for row in rows(arguments.backend, is_rehearsal, arguments.small))


if __name__ == "__main__":
    main()
