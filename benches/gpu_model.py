"""A static model of the Triton kernels: what their machine code can reach on a GPU.

``python -m benches.gpu_model`` compiles every regime for sm_90, counts what a call runs for each
element of the output, and sets it against what a GPU can issue and move while the same bytes are
copied. It predicts; nothing here has been measured on a GPU.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from benches.machine_code import Kernel, compile_call
from metapool_kernels import DEFAULT_CANDIDATES, pool_candidates
from metapool_kernels._triton import launch
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.layout import memory_format
from metapool_kernels.ops import PoolSpec


@dataclass(frozen=True)
class Gpu:
    """What the model needs to know: processors, clock under load, speed of a copy on the device."""

    name: str
    processors: int
    clock: float
    """Cycles a second."""
    copy: float
    """Bytes a second, read and written together."""

    def budget(self, size: int) -> float:
        """Instructions of one lane that can be issued while ``size`` bytes are copied."""
        return 4 * 32 * self.processors * self.clock * size / self.copy


GPUS = (Gpu("H100", 132, 1.58e9, 3.0e12), Gpu("H200", 132, 1.58e9, 4.3e12))

# Cycles that an instruction of a warp holds its unit, a quarter of a processor; one for all others.
# Integer and comparing units have 16 lanes, those for loads and stores serve all four quarters.
_INTEGER_NAMES = """
    FMNMX FMNMX3 FSEL FSETP F2FP I2F I2FP IADD IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL
    SHF VIADD VIMNMX VOTE
"""
_INTEGER = frozenset(_INTEGER_NAMES.split())
_MEMORY = frozenset(("LDG", "LDS", "SHFL", "STG", "STS"))


@dataclass(frozen=True)
class Case:
    """A call of the table."""

    channels: int
    side: int
    backward: bool
    candidates: str = "default"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    batch: int = 128

    @property
    def elements(self) -> int:
        """Of the output, and of the input."""
        return self.batch * self.channels * self.side**2

    @property
    def bytes(self) -> int:
        """Moved for each element: x and y forward; x, the gradient of y and that of x backward."""
        return (3 if self.backward else 2) * self.dtype.itemsize

    def compile(self, capability: int = 90) -> Kernel:
        """The kernel that the call would start."""
        names = pool_candidates(kinds=("avg",), skip=False)
        names = names if self.candidates == "avg" else DEFAULT_CANDIDATES
        codes = tuple(candidate.code for candidate in parse_candidates(names))
        spec = PoolSpec(codes, (1, 1), True, self.channels_last, "triton")
        x = torch.empty(
            (self.batch, self.channels, self.side, self.side),
            dtype=self.dtype,
            device="meta",
            memory_format=memory_format(self.channels_last),
        )
        weights = torch.empty(len(codes), device="meta")

        def call() -> object:
            if self.backward:
                return launch.meta_pool_bwd(x, x, weights, None, spec, (True, True))
            return launch.meta_pool_fwd(x, weights, None, spec)

        constants = {"RERUNS": False} if self.backward else {}  # there are no NaN
        return compile_call(call, backward=self.backward, capability=capability, **constants)


MAPS = ((96, 56), (144, 28), (384, 14), (960, 7))


def cases() -> Iterator[Case]:
    """The rows of the table."""
    for backward in (False, True):
        for candidates in ("avg", "default"):
            for channels, side in MAPS:
                for dtype in (torch.float32, torch.bfloat16):
                    for channels_last in (False, True):
                        yield Case(channels, side, backward, candidates, dtype, channels_last)


@dataclass(frozen=True)
class Prediction:
    """What the machine code of a case says."""

    case: Case
    kernel: Kernel

    @property
    def per_element(self) -> Counter[str]:
        """Instructions of one lane for each element, idle lanes and halos spread over them."""
        times = self.kernel.lanes / self.case.elements
        executed = self.kernel.executed(self.case.side)
        return Counter({name: count * times for name, count in executed.items()})

    @property
    def cycles(self) -> dict[str, float]:
        """Issue slots, and slots of the units that can be the limit instead."""
        counts = self.per_element
        return {
            "issue": sum(counts.values()),
            "integer": 2 * sum(counts[name] for name in _INTEGER),
            "memory": 4 * sum(counts[name] for name in _MEMORY),
        }

    def share(self, gpu: Gpu) -> tuple[float, str]:
        """Predicted part of copy speed, and what limits it."""
        limit, needed = max(self.cycles.items(), key=lambda item: item[1])
        share = gpu.budget(self.case.bytes) / needed
        return (1.0, "copy") if share >= 1 else (share, limit)


def predict(case: Case) -> Prediction:
    """Compile a case for sm_90 and count."""
    return Prediction(case, case.compile())


def table(predictions: list[Prediction]) -> str:
    """All of it as Markdown."""
    head = ["map", "dtype", "layout", "candidates", "registers", "instructions", "integer"]
    head += [f"{gpu.name}: share of copy speed" for gpu in GPUS]
    lines = []
    for backward in (False, True):
        lines += ["", f"### {'Backward' if backward else 'Forward'}", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for prediction in predictions:
            case, kernel, cycles = prediction.case, prediction.kernel, prediction.cycles
            if case.backward is not backward:
                continue
            cells = [
                f"{case.channels} x {case.side}²",
                str(case.dtype).removeprefix("torch."),
                "channels_last" if case.channels_last else "NCHW",
                case.candidates,
                str(kernel.registers),
                f"{cycles['issue']:.0f}",
                f"{cycles['integer']:.0f}",
            ]
            for gpu in GPUS:
                share, limit = prediction.share(gpu)
                cells.append(f"{share:.0%} ({limit})")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_TEXT = """# What the Triton kernels should reach on a GPU: a prediction

None of this was measured on a GPU. It is read off the machine code that Triton {triton} makes for
sm_90, by `python -m benches.gpu_model`, for batches of 128.

*Instructions* are issue slots of one lane for each element of the output: all that a program
executes, halos, idle lanes and both sides of every branch among them, over what it produces.
*Integer* are cycles of the units for integers, comparisons, minima and maxima, which take two for
each instruction of a warp. While the bytes of an element are copied, a GPU has this many slots:

{budgets}

The share of copy speed is these over the larger figure; in brackets what is the limit. *memory*
counts four cycles for each load, store and shuffle. The model knows nothing of latency, of caches,
and of loads that touch more lines than they need: backward with channels last reads across lanes
and will be slower than this.
{table}
"""


def _budgets() -> str:
    head = ["bytes for each element"] + [f"{gpu.name}, {gpu.copy / 1e12:.1f} TB/s" for gpu in GPUS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for size, what in ((8, "forward float32"), (4, "forward half"), (12, "backward float32"),
                       (6, "backward half")):  # fmt: skip
        cells = [f"{size} ({what})"] + [f"{gpu.budget(size):.0f}" for gpu in GPUS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benches/results/gpu-model.md"))
    path = parser.parse_args().out
    with ProcessPoolExecutor(2) as pool:
        predictions = list(pool.map(predict, cases()))
    page = _TEXT.format(triton=triton.__version__, budgets=_budgets(), table=table(predictions))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
