"""The loop of every program: one row after the other, each result on disk before the next."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from benches.gpu_check.journal import BEGUN, DONE, FAILED, PLANNED, Journal

Row = tuple[str, Callable[[], dict[str, Any]]]
"""A name, unique in its program, and what gives the numbers."""

DEVICE_LOST = 3
"""How a process ends in which the device no longer answers: a new one has to go on."""


class WrongNumbersError(Exception):
    """What was to be measured computes something else; the message says how far it is off."""


def work(rows: Iterable[Row]) -> None:
    """Run the rows that are not over yet, and write down what comes of them."""
    journal = Journal.of_environment()
    if journal is None:
        _print(rows)
        return
    todo = list(rows)
    journal.write("", PLANNED, rows=[name for name, _ in todo])
    ended = journal.ended()
    for name, run in todo:
        if name in ended:
            continue
        journal.write(name, BEGUN)
        try:
            found = run()
        except Exception as error:
            journal.write(name, FAILED, why=f"{type(error).__name__}: {error}"[:2000])
            leave_if_lost()
        else:
            if found:
                journal.write(name, DONE, **found)
            else:
                journal.write(name, FAILED, why="gave no numbers")


def _print(rows: Iterable[Row]) -> None:
    for name, run in rows:
        print(name, run(), flush=True)


def leave_if_lost() -> None:
    """End the process if the GPU has failed: nothing that it would still do there counts."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(DEVICE_LOST)
