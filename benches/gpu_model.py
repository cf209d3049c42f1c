"""A static model of the kernels for GPUs: what their machine code can reach there.

``python -m benches.gpu_model`` compiles every regime of the Triton and of the CUDA kernels for
sm_90, counts what a call runs for each element of the output, and sets it against what a GPU can
issue and move while the same bytes are copied. With ``--forms`` it does so for the passes of the
other forms, in Triton. It predicts; nothing here has been measured on a GPU.
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
from metapool_kernels.spec import PoolSpec


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
    form: str = "mix"
    """Of the mixture, or one of FORMS."""

    @property
    def elements(self) -> int:
        """Of the output, and of the input."""
        return self.batch * self.channels * self.side**2

    @property
    def bytes(self) -> int:
        """Moved for each element: x and y forward; x, the gradient of y and that of x backward."""
        maps = FORMS[self.form].maps if self.form != "mix" else 3 if self.backward else 2
        return maps * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Pass:
    """A pass over the maps that is not the mixture's."""

    backward: bool
    maps: int
    """Read and written, each element once."""


_COUNT = len(DEFAULT_CANDIDATES)
FORMS = {
    "side by side": Pass(False, 1 + _COUNT),
    "side by side, backward": Pass(True, 2 + _COUNT),
    "normalised: moments": Pass(False, 1),
    "normalised: mixture": Pass(False, 2),
    "normalised: products": Pass(False, 2),
    "normalised: fields": Pass(True, 3),
}
"""By name. What sums of lanes take is left out: it is as much as the sums, not as the maps."""

MAPS = ((96, 56), (144, 28), (384, 14), (960, 7))


def cases() -> Iterator[Case]:
    """The rows of the table."""
    for backward in (False, True):
        for candidates in ("avg", "default"):
            for channels, side in MAPS:
                for dtype in (torch.float32, torch.bfloat16):
                    for channels_last in (False, True):
                        yield Case(channels, side, backward, candidates, dtype, channels_last)


def form_cases() -> Iterator[Case]:
    """The rows of the table of other forms."""
    for form, about in FORMS.items():
        for channels, side in MAPS[:2]:
            for dtype in (torch.float32, torch.bfloat16):
                for channels_last in (False, True):
                    yield Case(
                        channels, side, about.backward, "default", dtype, channels_last, form=form
                    )


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
    terms = torch.empty((case.channels, len(codes)), device="meta")

    def call() -> object:
        match case.form:
            case "side by side":
                return launch.meta_pool_fwd(x, None, None, spec)
            case "side by side, backward":
                grads = torch.cat([x] * len(codes), 1)
                return launch.meta_pool_bwd(grads, x, None, None, spec, (True, False))
            case "normalised: moments":
                return launch._forward("moments", x, spec)
            case "normalised: mixture":
                return launch.affine_fwd(x, terms, terms[:, :1], spec)
            case "normalised: products":
                return launch._forward("products", x, spec, weights=terms, grad_out=x)
            case "normalised: fields":
                return launch.affine_bwd(x, x, *[terms] * 4, spec)
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


_FORMS_TEXT = """# What the passes of other forms should reach on a GPU: a prediction

As [the mixture's](gpu-model.md), by `python -m benches.gpu_model --forms`: Triton {triton}, sm_90,
seven default candidates, batches of 128. *Bytes* are those of each element of x that maps take,
read and written once; what sums of lanes take comes on top. The normalised mixture is moments and
mixture forward, {forward} bytes in float32, products and fields backward, {backward} bytes.

{table}
"""


def form_table(rows: list[tuple[Case, Prediction]]) -> str:
    """What is predicted for each pass."""
    head = ["pass", "map", "dtype", "layout", "bytes", "registers", "instructions"]
    head += [f"{gpu.name}: budget, share" for gpu in GPUS]
    cells = []
    for case, found in rows:
        layout = "channels_last" if case.channels_last else "NCHW"
        line = [case.form, f"{case.channels} x {case.side}²", case.dtype_name, layout]
        line += [str(case.bytes), str(found.registers), f"{found.cycles['issue']:.0f}"]
        for gpu in GPUS:
            share, limit = found.share(gpu)
            line.append(f"{gpu.budget(case.bytes):.0f}, {share:.0%} {limit}")
        cells.append(line)
    return _lines(head, cells)


def write_forms(path: Path) -> None:
    """Write the page of other forms."""
    every = list(form_cases())
    with ProcessPoolExecutor(2) as pool:
        rows = list(zip(every, pool.map(predict_triton, every), strict=True))

    def bytes_of(*passes: str) -> int:
        return 4 * sum(FORMS[f"normalised: {name}"].maps for name in passes)

    page = _FORMS_TEXT.format(
        triton=triton.__version__,
        forward=bytes_of("moments", "mixture"),
        backward=bytes_of("products", "fields"),
        table=form_table(rows),
    )
    path.write_text(page)
    print(page)


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
    parser.add_argument("--forms", action="store_true", help="of the other forms, in Triton")
    arguments = parser.parse_args()
    path = arguments.out
    if arguments.forms:
        return write_forms(path.with_name(f"{path.stem}-forms.md"))
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
