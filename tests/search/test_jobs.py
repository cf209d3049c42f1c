"""Work in several processes: all of it once, errors told, nothing left behind."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.jobs import side_by_side


def _write(folder: Path, item: int) -> None:
    with (folder / str(item)).open("x") as file:
        file.write(str(os.getpid()))
    time.sleep(0.2)  # so that one process does not do it all before the other has begun


def _writing(folder: Path) -> Callable[[int], None]:
    return partial(_write, folder)


def _refuse(folder: Path, item: int) -> None:
    _write(folder, item)
    if item == 0:
        raise UserError("item 0 cannot be done")


def _refusing(folder: Path) -> Callable[[int], None]:
    return partial(_refuse, folder)


def _die(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying() -> Callable[[int], None]:
    return _die


def test_every_item_once_in_as_many_processes(tmp_path: Path) -> None:
    side_by_side(partial(_writing, tmp_path), range(8), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(i) for i in range(8)]
    processes = {path.read_text() for path in tmp_path.iterdir()}
    assert len(processes) == 2 and str(os.getpid()) not in processes


def test_an_error_is_told_and_nothing_is_begun_after_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="item 0 cannot be done"):
        side_by_side(partial(_refusing, tmp_path), range(100), 2)
    assert 1 <= len(list(tmp_path.iterdir())) < 50


def test_a_killed_process_is_told() -> None:
    with pytest.raises(UserError, match=r"has ended.*SIGKILL"):
        side_by_side(_dying, range(4), 2)


def test_no_item_needs_no_process() -> None:
    side_by_side(_dying, [], 2)
