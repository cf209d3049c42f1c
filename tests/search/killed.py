"""``metapool`` that dies as by ``kill -9``, at the very moment that a test names.

``python -m tests.search.killed step:7 search ...`` dies before the seventh step of the weights,
``checkpoint:3`` between the two files of the third checkpoint.
"""

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from metapool_kernels.search.cli import main
from metapool_kernels.search.training import loop


def die_at(owner: Any, name: str, number: int, counts: Callable[..., bool]) -> None:
    """Replace a function by one that kills this process in its call ``number`` that counts."""
    original = getattr(owner, name)
    calls = count(1)

    def deadly(*arguments: Any, **options: Any) -> Any:
        if counts(*arguments) and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    moment, *arguments = sys.argv[1:]
    kind, number = moment.split(":")
    if kind == "step":
        die_at(loop, "weight_step", int(number), lambda *_: True)
    else:
        die_at(Path, "replace", int(number), lambda _, target: Path(target).name == "state.pt")
    sys.exit(main(arguments))
