"""Time and memory of the op on a GPU, by each backend in both layouts, and of its peers.

Every line of the static model (``benches/gpu_model.py``) has its row here. Beside each time stands
that of a copy of the same map, from the same minute.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton.testing

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
    for maps in (MAPS[:1], MAPS):
        yield from _default(maps)
        yield from _averages(maps)
    for backend in reversed(GPU_BACKENDS):
        for size in MAPS:
            for dtype in _DTYPES:
                yield from _in_layouts(_case(*size, Mode.DOUBLE, dtype), backend)


def _default(maps: Sequence[tuple[int, int]]) -> Iterator[Measured]:
    """The kernels in CUDA before those in Triton, some of which are still being compiled."""
    cases = [_case(*size, mode, dtype) for mode in _MODES for size in maps for dtype in _DTYPES]
    for backend in reversed(GPU_BACKENDS):
        for case in cases:
            yield from _in_layouts(case, backend)
    cases = [case for case in cases if case.mode is not Mode.X_ONLY]
    for case in cases:
        yield from _in_layouts(case, "eager")
    for case in cases:
        if case.dtype is torch.float32:  # in bfloat16 its ties could not be checked
            yield from _in_layouts(case, "nested max")
    yield from (Measured(case, False, _SLOW) for case in cases)


def _averages(maps: Sequence[tuple[int, int]]) -> Iterator[Measured]:
    modes = (Mode.FORWARD, Mode.BOTH)
    cases = [_case(*size, mode, dtype) for mode in modes for size in maps for dtype in _DTYPES]
    for who in (*reversed(GPU_BACKENDS), "merged convolution"):
        for case in cases:
            yield from _in_layouts(replace(case, candidates="avg"), who)


_DTYPES = (torch.float32, torch.bfloat16)


def _case(channels: int, side: int, mode: Mode, dtype: torch.dtype) -> Case:
    return Case((channels, side, side), mode, batch=BATCH, dtype=dtype, slow_peers=True)


def _in_layouts(case: Case, who: str) -> Iterator[Measured]:
    return (Measured(case, last, who) for last in (False, True))


_batch = lru_cache(maxsize=2)(inputs)


def steps_of(
    row: Measured, device: str, mode: Mode | None = None, times: int = 1
) -> list[Callable[[], object]]:
    """What is timed: calls without arguments, each on tensors of its own."""
    tensors = _batch(replace(row.case, mode=Mode.FORWARD), row.layout, device)
    found = []
    for _ in range(times):
        with torch.device(device):
            run = row.peer.make(row.case.names)
        own = (tensor.detach().clone() for tensor in tensors)
        found.append(make_step(run, mode or row.case.mode, *own))
    return found


def blank_step(row: Measured, mode: Mode) -> Callable[[], object]:
    """A call on the CPU with nothing drawn, from which one sees which kernels it would start."""
    size = (row.case.batch, *row.case.size)
    x = torch.empty(size, dtype=row.case.dtype, memory_format=row.layout)
    weights = torch.zeros(len(row.case.names))
    return make_step(row.peer.make(row.case.names), mode, x, weights, torch.empty_like(x))


def _clones(row: Measured) -> int:
    """On so many maps in turn a call finds nothing in the second-level cache."""
    cache: int = torch.cuda.get_device_properties(0).L2_cache_size
    return min(32, -(-4 * cache // (2 * row.case.elements * row.case.dtype.itemsize)))


def _launched(step: Callable[[], object]) -> float:
    """Median seconds of a call from Python, with nothing of its maps in the second-level cache."""
    return float(triton.testing.do_bench(step, warmup=25, rep=25, return_mode="median")) / 1e3


def _replayed(steps: Sequence[Callable[[], object]]) -> float:
    """Median seconds of a call in a graph of several: what the device takes for it."""
    every = partial(_call_all, steps)
    median = float(triton.testing.do_bench_cudagraph(every, rep=5, return_mode="median"))
    return median / 1e3 / len(steps)


def _call_all(steps: Sequence[Callable[[], object]]) -> list[object]:
    return [step() for step in steps]


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
    if row.who == _SLOW:  # after some compilations torch would go on without, and not say so
        torch._dynamo.reset()
        peers.compiled.cache_clear()
    wrong = problem(row.case, row.peer, device)
    if wrong is not None:
        raise WrongNumbersError(wrong)
    (step,) = steps_of(row, device)
    copy = Measured(replace(row.case, mode=Mode.FORWARD), False, peers.COPY)
    (copies,) = steps_of(copy, device)
    found: dict[str, Any] = _facts(row)
    if device != "cuda":
        times = interleave({"launched": step, "copy launched": copies}, QUICK)
        return found | {name: one.median for name, one in times.items()}
    found |= {"launched": _launched(step), "copy launched": _launched(copies)}
    found["peak bytes"] = _peak(step)
    try:
        found |= _as_graphs(row, copy)
    except RuntimeError as error:  # some peer waits for the device
        found["no graph"] = str(error)[:300]
    return found


def _as_graphs(row: Measured, copy: Measured) -> dict[str, float]:
    times = _clones(row)
    found = {
        "replayed": _replayed(steps_of(row, "cuda", times=times)),
        "copy replayed": _replayed(steps_of(copy, "cuda", times=times)),
    }
    if row.case.mode in (Mode.BOTH, Mode.X_ONLY):
        found["forward replayed"] = _replayed(steps_of(row, "cuda", Mode.FORWARD, times))
    return found


def _warm_up() -> None:
    """A second of work: a GPU that rests has a fraction of its clock."""
    x = torch.randn(4096, 4096, device="cuda")
    began = time.perf_counter()
    while time.perf_counter() - began < 1:
        x @ x
        torch.cuda.synchronize()


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
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device == "cuda":
        _warm_up()

    def of(row: Measured) -> Row:
        return str(row), lambda: measure(row, device)

    work(of(row) for row in rows(tiny=device == "cpu"))


if __name__ == "__main__":
    main()
