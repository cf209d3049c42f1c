"""Steps and the programs in them: each in its own process, watched by what it writes down.

A program that says nothing for too long is killed, one that dies is started again behind the row
that it died in, and when the time of a step is over all of its programs are.
"""

import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benches.gpu_check.journal import CUT, FAILED, Journal
from benches.gpu_check.worker import DEVICE_LOST

ROOT = Path(__file__).parents[2]
_LOOK = 0.1
"""Seconds between two looks at a process."""
_TAIL = 1500
"""Characters of what a program printed last."""
ITSELF = "the program itself"
"""What has failed where no row is being run."""


@dataclass(frozen=True)
class Program:
    """What runs in one process.

    Args:
        name: unique in its step.
        command: with its arguments.
        environment: what is added to that of this process.
        patience: seconds between two words of it, once it has said the first.
        alarm: regular expression of what it only prints if something is wrong.
        promise: regular expression of what it prints in the end, if it has done its work.
        measures: whether what it finds stays valid on another day: then it is not measured twice.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: float = 30
    alarm: str | None = None
    promise: str | None = None
    measures: bool = False


@dataclass(frozen=True)
class Step:
    """Programs that run beside each other, and how long they may take together.

    Args:
        name: unique.
        seconds: after which all of them are stopped.
        programs: at least one.
    """

    name: str
    seconds: float
    programs: tuple[Program, ...]


def run_step(step: Step, path: Path) -> float:
    """Run a step to its end, which comes within its time; all that it finds is in the journal.

    Returns:
        The seconds that it took.
    """
    began = time.monotonic()
    with ThreadPoolExecutor(len(step.programs)) as pool:
        waiting = [
            pool.submit(_run, program, Journal(path, step.name, program.name), began + step.seconds)
            for program in step.programs
        ]
    for future in waiting:
        future.result()
    return time.monotonic() - began


def _run(program: Program, journal: Journal, end: float) -> None:
    """A program, in as many processes as it takes."""
    while True:
        with tempfile.TemporaryFile() as output:
            why = _run_once(program, journal, end, output)
            row, is_over = journal.in_flight(), time.monotonic() >= end
            if found := _alarm(program, output, has_ended=why is None):
                journal.write(ITSELF, FAILED, why=found, output=_tail(output))
            if why is None and row is None:
                return
            if is_over and journal.has_begun():
                journal.write(row or ITSELF, CUT)
                return
            if row is None and why == _lost(DEVICE_LOST):  # the row says why
                continue
            why = why or "ended with exit code 0, in the middle of a row"
            journal.write(row or ITSELF, FAILED, why=why, output=_tail(output))
        if row is None or is_over:
            return


_processes: set["subprocess.Popen[bytes]"] = set()
"""Those that run now."""


def _run_once(program: Program, journal: Journal, end: float, output: IO[bytes]) -> str | None:
    """Until the process ends by itself or is ended; why it did not end well."""
    process = subprocess.Popen(
        program.command,
        cwd=ROOT,
        env=os.environ | dict(program.environment) | journal.environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    _processes.add(process)
    try:
        return _watch(process, program, journal, end)
    finally:
        _kill(process)
        _processes.discard(process)


def _watch(
    process: "subprocess.Popen[bytes]", program: Program, journal: Journal, end: float
) -> str | None:
    heard, tail = math.inf, journal.tail()  # how long it takes to start is no sign
    while process.poll() is None:
        now = time.monotonic()
        if next(tail):
            heard = now
        if now >= end:
            return "cut off before its first row: the time of the step was over"
        if now - heard > program.patience:
            return f"hung: silent for {program.patience:.0f} s"
        time.sleep(_LOOK)
    return None if process.returncode == 0 else _lost(process.returncode)


def _lost(code: int) -> str:
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The process and all that it has started; one that the driver holds is left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


def kill_all() -> None:
    """All programs that run now: they have sessions of their own, and would go on."""
    for process in list(_processes):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _alarm(program: Program, output: IO[bytes], *, has_ended: bool) -> str | None:
    """The first line that should not be there, or what should be there and is not."""
    output.seek(0)
    text = output.read().decode(errors="replace")
    if program.alarm is not None:
        for line in text.splitlines():
            if re.search(program.alarm, line):
                return line
    if has_ended and program.promise is not None and not re.search(program.promise, text):
        return f"it did not print {program.promise!r}"
    return None


def _tail(output: IO[bytes]) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - _TAIL))
    return output.read().decode(errors="replace")
