"""Kernels compiled before they are needed, many at once.

Triton compiles a kernel when it is first called: on one core, while everything else waits. Which
kernels a program will call can be seen by running it once with none of them (:func:`recorded`);
:func:`compile_starts` then has all cores compile them. Most of compiling is done outside Python's
lock, so that threads are enough.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

from metapool_kernels._triton import launch

KERNELS = ("meta_pool_fwd_kernel", "meta_pool_bwd_kernel", "meta_pool_sums_kernel")
"""By their names in :mod:`metapool_kernels._triton.launch`, which starts them."""


@dataclass(frozen=True)
class Pointer:
    """What a kernel is compiled for of a tensor: its dtype, and whether its address is aligned."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """As of a tensor."""
        return self.address


@dataclass(frozen=True)
class Start:
    """A kernel as a call would start it, without its tensors."""

    kernel: str
    """One of KERNELS."""
    programs: int
    arguments: tuple[Any, ...]
    """Numbers, and a :class:`Pointer` in the place of each tensor."""
    constants: dict[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for starts of one compiled kernel, and now and then different all the same."""
        return self.kernel, _specialised(self.arguments), tuple(self.constants.items())


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16)
    if isinstance(value, tuple):
        return type(value)(*map(_without_tensors, value))  # a map or weights, which have names
    return value


def _specialised(value: Any) -> object:
    """What Triton can tell apart: 1, multiples of 16 and numbers beyond 32 bits."""
    if isinstance(value, tuple):
        return tuple(map(_specialised, value))
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return value


class _Recorder:
    """Stands in for a kernel, starts nothing and keeps how it would have been started."""

    def __init__(self, name: str, starts: list[Start]) -> None:
        self.name, self.starts = name, starts

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def start(*args: Any, **constants: Any) -> None:
            arguments = tuple(map(_without_tensors, args))
            self.starts.append(Start(self.name, grid[0], arguments, constants))

        return start


@contextmanager
def recorded() -> Iterator[list[Start]]:
    """Inside, calls start no kernel and leave their outputs as they are: anything.

    Gives the list of what they would have started, with every configuration where METAPOOL_AUTOTUNE
    would have tried several. It holds for all threads, since autograd has its own.
    """
    starts: list[Start] = []
    kernels = {name: getattr(launch, name) for name in KERNELS}
    tuned = dict(launch._tuned)
    for name in KERNELS:
        setattr(launch, name, _Recorder(name, starts))
    try:
        yield starts
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)
        launch._tuned.clear()  # of times in which nothing ran
        launch._tuned.update(tuned)


def compile_starts(
    starts: Sequence[Start],
    cores: int | None = None,
    tell: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Compile what has been recorded, into this process and Triton's cache on disk.

    A kernel that does not compile is passed over: whoever calls it is told why.

    Args:
        starts: of :func:`recorded`, repeated ones among them.
        cores: so many at once; all that there are by default.
        tell: called with how many are done of how many, after each.

    Returns:
        How many different kernels there were.
    """
    different = {start.key: start for start in starts}
    done, lock = 0, Lock()

    def count(future: "Future[Any]") -> None:  # in the thread that has compiled
        nonlocal done
        with lock:
            done += 1
            tell(done, len(different))

    pool = _Pool(cores or os.cpu_count() or 1, count)
    with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for start in different.values():
            kernel = getattr(launch, start.kernel)
            kernel.warmup(*start.arguments, grid=(start.programs,), **start.constants)
    return len(different)


class _Pool(ThreadPoolExecutor):
    """Tells when a task has ended."""

    def __init__(self, threads: int, when_done: Callable[["Future[Any]"], None]) -> None:
        super().__init__(threads)
        self.when_done = when_done

    def submit(self, *args: Any, **kwargs: Any) -> "Future[Any]":
        future = super().submit(*args, **kwargs)
        future.add_done_callback(self.when_done)
        return future
