"""Time and memory of the op on a GPU, by each backend in both layouts, and of its peers.

Every line of the static model (``benches/gpu_model.py``) has its row here. Beside each time stands
that of a copy of the same map, from the same minute.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton.testing
from torch import Tensor

from benches import peers
from benches.cases import Case, Mode
from benches.gpu_check.device import prepare
from benches.gpu_check.worker import Row, WrongNumbersError, work
from benches.gpu_model import MAPS
from benches.measure import inputs, make_step, problem
from benches.peers import PEERS, Peer
from benches.timing import QUICK, interleave
from metapool_kernels import fused_meta_pool

GPU_BACKENDS = ("triton", "cuda")
BATCH = 128
_DRAWN = 8
"""Images that are drawn at random; the batch repeats them."""
_MODES = (Mode.FORWARD, Mode.BOTH, Mode.X_ONLY)
_SLOW = "torch.compile"


@dataclass(frozen=True)
class Measured:
    """A case, in one layout, by one of the backends or of the peers."""

    case: Case
    channels_last: bool
    who: str

    @property
    def layout(self) -> torch.memory_format:
        """Of the map and of the gradient."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def peer(self) -> Peer:
        """What is measured."""
        if self.who in GPU_BACKENDS:
            return Peer(partial(_ours, backend=self.who), self.layout)
        return PEERS[f"{self.who} channels_last" if self.channels_last else self.who]

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{self.case}, {layout}, {self.who}"


def _ours(names: tuple[str, ...], backend: str) -> peers.Run:
    return partial(fused_meta_pool, candidates=names, normalize=None, backend=backend)


def rows(tiny: bool) -> list[Measured]:
    """All of them, the most important first; or a few tiny ones for a rehearsal."""
    if tiny:
        case = Case((2, 5, 6), Mode.BOTH, batch=2)
        found = [Measured(case, last, who) for last in (False, True) for who in GPU_BACKENDS]
        return [*found, Measured(case, False, "eager")]
    return list(dict.fromkeys(_rows()))


def _rows() -> Iterator[Measured]:
    """Those in CUDA before those in Triton, some of whose kernels are still being compiled."""
    for maps in (MAPS[:1], MAPS):
        main = [_case(*size, mode, dtype) for mode in _MODES for size in maps for dtype in _DTYPES]
        for_peers = [case for case in main if case.mode is not Mode.X_ONLY]
        for backend in reversed(GPU_BACKENDS):
            for case in main:
                yield from _in_layouts(case, backend)
        for case in for_peers:
            yield from _in_layouts(case, "eager")
        for case in for_peers:
            if case.dtype is torch.float32:  # in bfloat16 its ties could not be checked
                yield from _in_layouts(case, "nested max")
    averages = [
        replace(_case(*size, mode, dtype), candidates="avg")
        for mode in (Mode.FORWARD, Mode.BOTH)
        for size in MAPS
        for dtype in _DTYPES
    ]
    twice = [_case(*size, Mode.DOUBLE, dtype) for size in MAPS for dtype in _DTYPES]
    for backend in reversed(GPU_BACKENDS):
        for case in (*averages, *twice):
            yield from _in_layouts(case, backend)
    for case in averages:
        yield from _in_layouts(case, "merged convolution")
    yield from (Measured(case, False, _SLOW) for case in for_peers)


_DTYPES = (torch.float32, torch.bfloat16)


def _case(channels: int, side: int, mode: Mode, dtype: torch.dtype) -> Case:
    return Case((channels, side, side), mode, batch=BATCH, dtype=dtype, slow_peers=True)


def _in_layouts(case: Case, who: str) -> Iterator[Measured]:
    return (Measured(case, last, who) for last in (False, True))


@lru_cache(maxsize=2)
def _batch(case: Case, layout: torch.memory_format, device: str) -> tuple[Tensor, Tensor, Tensor]:
    drawn = min(_DRAWN, case.batch)
    x, weights, grad_out = inputs(replace(case, batch=drawn), layout, device)
    times = case.batch // drawn
    whole = (t.repeat(times, 1, 1, 1).contiguous(memory_format=layout) for t in (x, grad_out))
    x, grad_out = whole
    return x, weights, grad_out


def step_of(row: Measured, device: str, mode: Mode | None = None) -> Callable[[], object]:
    """What is timed: a call without arguments."""
    plain = replace(row.case, mode=Mode.FORWARD, candidates=row.case.candidates)
    tensors = (tensor.detach() for tensor in _batch(plain, row.layout, device))
    with torch.device(device):
        run = row.peer.make(row.case.names)
    return make_step(run, mode or row.case.mode, *tensors)


def _launched(step: Callable[[], object]) -> float:
    """Median seconds of a call from Python, with nothing of its maps in the second-level cache."""
    return float(triton.testing.do_bench(step, warmup=5, rep=30, return_mode="median")) / 1e3


def _replayed(step: Callable[[], object]) -> float:
    """Median seconds of a call in a graph: what the device takes for it."""
    return float(triton.testing.do_bench_cudagraph(step, rep=20, return_mode="median")) / 1e3


def _peak(step: Callable[[], object]) -> int:
    """Bytes that a step takes beyond what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure(row: Measured, device: str) -> dict[str, Any]:
    """Seconds and bytes of a row.

    Raises:
        WrongNumbersError: it computes something else.
    """
    torch.manual_seed(0)
    wrong = problem(row.case, row.peer, device)
    if wrong is not None:
        raise WrongNumbersError(wrong)
    step = step_of(row, device)
    copy = Measured(replace(row.case, mode=Mode.FORWARD), False, peers.COPY)
    copies = step_of(copy, device)
    found: dict[str, Any] = _facts(row)
    if device != "cuda":
        times = interleave({"launched": step, "copy launched": copies}, QUICK)
        return found | {name: one.median for name, one in times.items()}
    found |= {"launched": _launched(step), "copy launched": _launched(copies)}
    found["peak bytes"] = _peak(step)
    try:
        found |= _as_graphs(row, step, copies, device)
    except RuntimeError as error:  # some peer, or a case of ours, waits for the device
        found["no graph"] = str(error)[:300]
    return found


def _as_graphs(
    row: Measured, step: Callable[[], object], copies: Callable[[], object], device: str
) -> dict[str, float]:
    if row.who == _SLOW:  # it has graphs of its own
        return {}
    found = {"replayed": _replayed(step), "copy replayed": _replayed(copies)}
    if row.case.mode in (Mode.BOTH, Mode.X_ONLY):
        found["forward replayed"] = _replayed(step_of(row, device, Mode.FORWARD))
    return found


def _facts(row: Measured) -> dict[str, Any]:
    """The row in words, for the tables."""
    channels, height, width = row.case.size
    return {
        "map": f"{channels} x {height}²" if height == width else f"{channels} x {height} x {width}",
        "batch": row.case.batch,
        "dtype": str(row.case.dtype).removeprefix("torch."),
        "layout": "channels_last" if row.channels_last else "NCHW",
        "candidates": row.case.candidates,
        "mode": row.case.mode.value,
        "who": row.who,
        "map bytes": row.case.elements * row.case.dtype.itemsize,
    }


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    prepare(device)

    def of(row: Measured) -> Row:
        return str(row), lambda: measure(row, device)

    work(of(row) for row in rows(tiny=device == "cpu"))


if __name__ == "__main__":
    main()
