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
from benches.gpu_check.figures import Measured, step_of
from benches.gpu_check.worker import Row, work
from metapool_kernels import dispatch
from metapool_kernels._triton.ahead import Start, compile_starts, recorded

CAPABILITY = 90
"""What is compiled for where there is no GPU."""
_REHEARSED = 4
"""Kernels of a rehearsal: they are real ones."""


class NoGpu:
    """Triton's driver as far as compiling asks for it, on a machine without any."""

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", CAPABILITY, 32)


def pretend() -> None:
    """Let the kernels be compiled for a GPU that is not there, by calls on the CPU."""
    triton.runtime.driver.set_active(NoGpu())
    dispatch.BACKENDS["triton"] = lambda x: None


def starts(tiny: bool, device: str) -> list[Start]:
    """What the rows of triage and of the figures start, the most important first."""
    found: list[Start] = []
    for row in [*triage.rows("triton", tiny), *figures.rows(tiny)]:
        if row.who == "triton":
            found += _starts_of(row, device)
    different = list({start.key: start for start in found}.values())
    return different[:_REHEARSED] if tiny else different


def _starts_of(row: Measured, device: str) -> list[Start]:
    modes = {row.case.mode, Mode.FORWARD}
    with recorded() as found:
        for mode in sorted(modes, key=lambda mode: mode is not Mode.FORWARD):
            step_of(row, device, mode)()
    return found


def _compile(start: Start) -> dict[str, Any]:
    began = time.perf_counter()
    compile_starts([start], cores=1)
    return {"seconds": round(time.perf_counter() - began, 3)}


def _name(index: int, start: Start) -> str:
    what = "forward" if "fwd" in start.kernel else "backward"
    x = start.arguments[0].data
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
    parser.add_argument("--count", action="store_true", help="only say how many there are")
    parser.add_argument("--compile", type=int, metavar="N", help="compile every Nth of them")
    arguments = parser.parse_args()
    if arguments.device == "cpu" or arguments.count:
        pretend()
    if not arguments.count:
        every = starts(arguments.device == "cpu", arguments.device)
        work(_rows(every, arguments.part, arguments.parts))
        return
    every = starts(False, "cpu")
    print(f"{len(every)} kernels for triage and figures")
    if arguments.compile:
        began = time.process_time()
        for name, run in _rows(every, 0, arguments.compile):
            print(name, run(), flush=True)
        print(f"{time.process_time() - began:.0f} s of CPU for every {arguments.compile}th")


if __name__ == "__main__":
    main()
