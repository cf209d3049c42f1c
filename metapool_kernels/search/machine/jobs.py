"""Work that does not depend on other work, in several processes of one machine."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.interrupts import kept_from_children

T = TypeVar("T")


def side_by_side(prepare: Callable[[], Callable[[T], None]], items: Sequence[T], jobs: int) -> None:
    """Call what ``prepare`` returns with each item, ``jobs`` items at a time.

    Each process prepares for itself; items are begun in order. After a :class:`UserError` those
    that others have begun are finished, and no more are begun; anything else ends all processes at
    once. They end with this one, however it ends.

    Args:
        prepare: picklable.
        items: picklable.
        jobs: number of processes, more than there are items being of no use.

    Raises:
        UserError: an item has raised it, or a process has ended before its time.
    """
    context = get_context("spawn")
    begun, errors = context.Value("i", 0), context.SimpleQueue()
    with kept_from_children():
        processes: Any = start_processes(
            _work_off,
            args=(prepare, items, begun, errors),
            nprocs=min(jobs, len(items)),
            join=False,
            start_method="spawn",
        )
    try:
        while not processes.join():
            pass
    except ProcessExitedException as error:
        raise UserError(f"a process beside this one has ended: {error}") from error
    finally:
        for process in processes.processes:
            process.terminate()
    if not errors.empty():
        raise UserError(errors.get())


def _work_off(number: int, prepare: Any, items: Sequence[Any], begun: Any, errors: Any) -> None:
    """One of the processes: take the next item until there is none."""
    try:
        work = prepare()
        while (position := _next(begun)) < len(items):
            work(items[position])
    except UserError as error:
        begun.value = len(items)
        errors.put(str(error))


def _next(begun: Any) -> int:
    with begun.get_lock():
        position: int = begun.value
        begun.value += 1
    return position
