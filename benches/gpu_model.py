"""A static model of the kernels for GPUs: what their machine code can reach there.

``python -m benches.gpu_model`` compiles every regime of the Triton and of the CUDA kernels for
sm_90, counts what a call runs for each element of the output, and sets it against what a GPU can
issue and move while the same bytes are copied. It predicts; nothing here has been measured on a
GPU.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from benches import cuda_code
from benches.machine_code import compile_call
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


PREDICTED = Path(__file__).parent / "results" / "gpu-model.json"
"""What this program has predicted, for ``make gpu-check`` to set its measurements beside."""

CAPABILITY = 90
GPUS = (Gpu("H100", 132, 1.58e9, 3.0e12), Gpu("H200", 132, 1.58e9, 4.3e12))

# Cycles that an instruction of a warp holds its unit, a quarter of a processor; one for all others.
# Integer and comparing units have 16 lanes, those for loads and stores serve all four quarters.
_INTEGER_NAMES = """
    FMNMX FMNMX3 FSEL FSETP F2FP I2F I2FP IADD IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL
    SHF VIADD VIMNMX VOTE
"""
_INTEGER = frozenset(_INTEGER_NAMES.split())
_MEMORY = frozenset(("LD", "LDG", "LDS", "SHFL", "STG", "STS"))


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

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


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
    """What the machine code of one backend says about a case."""

    case: Case
    registers: int
    per_element: Counter[str]
    """Instructions of a thread for each element, idle threads and halos spread over them."""

    @classmethod
    def of(cls, case: Case, registers: int, executed: Counter[str], threads: int) -> "Prediction":
        """Spread what each of so many threads executes over the elements."""
        times = threads / case.elements
        spread = {name: count * times for name, count in executed.items()}
        return cls(case, registers, Counter(spread))

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


def predict_triton(case: Case) -> Prediction:
    """Compile the Triton kernel that a case starts, and count."""
    names = pool_candidates(kinds=("avg",), skip=False)
    names = names if case.candidates == "avg" else DEFAULT_CANDIDATES
    codes = tuple(candidate.code for candidate in parse_candidates(names))
    spec = PoolSpec(codes, (1, 1), True, case.channels_last, "triton")
    x = torch.empty(
        (case.batch, case.channels, case.side, case.side),
        dtype=case.dtype,
        device="meta",
        memory_format=memory_format(case.channels_last),
    )
    weights = torch.empty(len(codes), device="meta")

    def call() -> object:
        if case.backward:
            return launch.meta_pool_bwd(x, x, weights, None, spec, (True, True))
        return launch.meta_pool_fwd(x, weights, None, spec)

    constants = {"RERUNS": False} if case.backward else {}  # there are no NaN
    kernel = compile_call(call, backward=case.backward, capability=CAPABILITY, **constants)
    return Prediction.of(case, kernel.registers, kernel.executed(case.side), kernel.lanes)


def predict_cuda(case: Case) -> Prediction:
    """Find the CUDA kernel that a case starts, and count."""
    what = "backward" if case.backward else "forward"
    kinds = "avg" if case.candidates == "avg" else "avg+max"
    start = cuda_code.launch_of(
        f"{what}, {kinds}, {case.dtype_name}",
        (case.batch, case.channels, case.side, case.side),
        channels_last=case.channels_last,
        capability=CAPABILITY,
    )
    return Prediction.of(case, start.kernel.code.registers, start.executed, start.threads)


BACKENDS: dict[str, Callable[[Case], Prediction]] = {
    "Triton": predict_triton,
    "CUDA": predict_cuda,
}

Row = tuple[Case, dict[str, Prediction]]
"""A case, and what is predicted for it, by backend."""


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The lines of the tables: shares of copy speed by backend, as it is called, and GPU."""
    return [
        {
            "map": f"{case.channels} x {case.side}²",
            "dtype": case.dtype_name,
            "layout": "channels_last" if case.channels_last else "NCHW",
            "candidates": case.candidates,
            "what": "backward" if case.backward else "forward",
            "shares": {
                backend.lower(): {gpu.name: round(found.share(gpu)[0], 3) for gpu in GPUS}
                for backend, found in predictions.items()
            },
        }
        for case, predictions in rows
    ]


def _lines(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def table(rows: list[Row]) -> str:
    """What is predicted for each case."""
    head = ["map", "dtype", "layout", "candidates"]
    for backend in BACKENDS:
        head += [f"{backend}: registers", "instructions", *(gpu.name for gpu in GPUS)]
    cells = []
    for case, predictions in rows:
        layout = "channels_last" if case.channels_last else "NCHW"
        line = [f"{case.channels} x {case.side}²", case.dtype_name, layout, case.candidates]
        for prediction in predictions.values():
            line += [str(prediction.registers), f"{prediction.cycles['issue']:.0f}"]
            for share, limit in map(prediction.share, GPUS):
                line.append(f"{share:.0%} {limit}")
        cells.append(line)
    return _lines(head, cells)


def summary(rows: list[Row], gpu: Gpu) -> str:
    """The least and the most of what is predicted over all maps and layouts."""
    dtypes = list(dict.fromkeys(case.dtype_name for case, _ in rows))
    head = [f"{gpu.name}, all maps and layouts"]
    head += [f"{dtype}, {backend}" for dtype in dtypes for backend in BACKENDS]
    shares: dict[str, dict[tuple[str, str], list[float]]] = {}
    for case, predictions in rows:
        what = "averages 3, 5, 7" if case.candidates == "avg" else "seven default candidates"
        line = shares.setdefault(f"{'backward' if case.backward else 'forward'}, {what}", {})
        for backend, prediction in predictions.items():
            found = line.setdefault((case.dtype_name, backend), [])
            found.append(prediction.share(gpu)[0])
    cells = []
    for name, by_column in shares.items():
        columns = [by_column[dtype, backend] for dtype in dtypes for backend in BACKENDS]
        cells.append([name, *(_span(min(column), max(column)) for column in columns)])
    return _lines(head, cells)


def _span(least: float, most: float) -> str:
    low, high = f"{least:.0%}", f"{most:.0%}"
    return low if low == high else f"{low[:-1]}-{high}"


_TEXT = """# What the kernels should reach on a GPU: a prediction

None of this was measured on a GPU. It is read off the machine code that Triton {triton} and nvcc
{nvcc} make for sm_90, by `python -m benches.gpu_model`, for batches of 128.

*Instructions* are issue slots of one thread for each element of the output: all that it executes,
halos and idle threads among it, over what it produces. While the
bytes of an element are copied, a GPU has this many slots:

{budgets}

The share of copy speed is these over what is needed, of issue slots or of a unit that takes more;
beside it is the limit. The units for integers, comparisons, minima and maxima (*integer*) take two
cycles for each instruction of a warp, those for loads, stores and shuffles (*memory*) four.

CUDA's backward asks of each row whether there is input, a window and something to give back, and
takes eight rows a round: what these branches skip is counted for the share of rows on the map.
Triton has loops of their own for the rows at either end, and writes small maps out; there both
sides of every branch count.

The model knows nothing of latency and of how many threads there are to hide it, of caches, of bank
conflicts in shared memory, and of loads that touch more lines than they need. Triton's backward
with channels last reads across lanes and will be slower than this.

{summary}

## Forward

{forward}

## Backward

{backward}
"""


def _budgets() -> str:
    head = ["bytes for each element", *(f"{gpu.name}, {gpu.copy / 1e12:.1f} TB/s" for gpu in GPUS)]
    sizes = {8: "forward float32", 4: "forward half", 12: "backward float32", 6: "backward half"}
    rows = [
        [f"{size} ({what})", *(f"{gpu.budget(size):.0f}" for gpu in GPUS)]
        for size, what in sizes.items()
    ]
    return _lines(head, rows)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=PREDICTED.with_suffix(".md"))
    path = parser.parse_args().out
    every = list(cases())
    by_backend = {}
    cuda_code.compile_all([CAPABILITY])  # which no two processes should do at once
    with ProcessPoolExecutor(2) as pool:
        for backend, predict in BACKENDS.items():
            by_backend[backend] = list(pool.map(predict, every))
    columns = zip(*by_backend.values(), strict=True)
    rows = [
        (case, dict(zip(by_backend, column, strict=True)))
        for case, column in zip(every, columns, strict=True)
    ]
    page = _TEXT.format(
        triton=triton.__version__,
        nvcc=cuda_code.nvcc_version(),
        budgets=_budgets(),
        summary=summary(rows, GPUS[0]),
        forward=table([row for row in rows if not row[0].backward]),
        backward=table([row for row in rows if row[0].backward]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    path.with_suffix(".json").write_text(json.dumps(as_json(rows), indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
