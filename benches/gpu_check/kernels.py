"""The Triton kernels that the other steps need, compiled by as many processes as there are cores.

``python -m benches.gpu_check.kernels --count`` says how many they are, on any machine; with
``--compile 4`` it also compiles every fourth of them, for sm_90, and says how long that takes.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from benches.cases import Mode
from benches.gpu_check import figures, triage
from benches.gpu_check.figures import Measured, blank_step
from benches.gpu_check.worker import Row, work
from metapool_kernels import dispatch
from metapool_kernels._triton import launch
from metapool_kernels._triton.ahead import Start, recorded

_REHEARSED = 2
"""Kernels of a rehearsal: they are real ones."""


class NoGpu:
    """Triton's driver as far as compiling asks for it: it needs no GPU, and keeps none busy."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", self.capability, 32)


def pretend(capability: int = 90) -> None:
    """Let the kernels be compiled for a GPU such as sm_90 by calls on the CPU."""
    triton.runtime.driver.set_active(NoGpu(capability))
    dispatch.BACKENDS["triton"] = lambda x: None


def starts(tiny: bool) -> list[Start]:
    """What the rows of triage and of the figures start, the most important first."""
    found: list[Start] = []
    for row in [*triage.rows("triton", tiny), *figures.rows(tiny)]:
        if row.who == "triton":
            found += _starts_of(row)
    different = list({start.key: start for start in found}.values())
    return different[:_REHEARSED] if tiny else different


def _starts_of(row: Measured) -> list[Start]:
    with recorded() as found:
        for mode in dict.fromkeys((Mode.FORWARD, row.case.mode)):
            blank_step(row, mode)()
    return found


def _compile(start: Start) -> dict[str, Any]:
    began = time.perf_counter()
    kernel = getattr(launch, start.kernel)
    kernel.warmup(*start.arguments, grid=(start.programs,), **start.constants)
    return {"seconds": round(time.perf_counter() - began, 3)}


def _name(index: int, start: Start) -> str:
    what = "forward" if "fwd" in start.kernel else "backward"
    first = start.arguments[0]  # a map, or the terms of sums
    x = getattr(first, "data", first)
    return f"{index}: {what}, {str(x.dtype).removeprefix('torch.')}"


def _rows(every: list[Start], part: int, parts: int) -> Iterator[Row]:
    for i in range(part, len(every), parts):
        yield _name(i, every[i]), lambda start=every[i]: _compile(start)


def main() -> None:
    """Compile one part of so many, or count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--count", action="store_true", help="only say how many there are")
    parser.add_argument("--compile", type=int, metavar="N", help="compile every Nth of them")
    arguments = parser.parse_args()
    pretend(arguments.capability)
    every = starts(arguments.device == "cpu" and not arguments.count)
    if not arguments.count:
        work(_rows(every, arguments.part, arguments.parts))
        return
    print(f"{len(every)} kernels for triage and figures")
    if arguments.compile:
        began = time.process_time()
        for name, run in _rows(every, 0, arguments.compile):
            print(name, run(), flush=True)
        print(f"{time.process_time() - began:.0f} s of CPU for every {arguments.compile}th")


if __name__ == "__main__":
    main()
