"""Ctrl-C: the main process alone sees it, and sees it for certain."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

_AGAIN = 0.05
"""Seconds until an interrupt that was lost is sent again: the destructor has ended by then."""


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Around the start of processes: these never see SIGINT, this one sees it afterwards.

    A terminal sends Ctrl-C to all of them, and each would end with a traceback of its own, or
    worse, in the middle of something that this one waits for. This one ends them.
    """
    arrived: list[Any] = []
    resource_tracker.ensure_running()  # which lifts the mask when it starts
    # The mask is what children inherit. Here another thread may take the signal all the same.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if main and before is not None:
        signal.signal(signal.SIGINT, lambda *received: arrived.append(received))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main and before is not None:
            signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def never_lost() -> Iterator[None]:
    """Send an interrupt again that arrived where Python drops exceptions.

    These are destructors: that of a DataLoader's iterator, which waits for its processes, takes
    a good part of a short epoch.
    """
    before, timers = sys.unraisablehook, []

    def hook(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            before(lost)
            return
        timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), signal.SIGINT))
        timers.append(timer)
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()
