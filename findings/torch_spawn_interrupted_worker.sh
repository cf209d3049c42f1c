#!/usr/bin/env bash
# torch.multiprocessing: a worker that alone receives SIGINT ends with exit code 0, and join() tells
# success, though its work was not done. Seen with torch 2.13.0 (CPU build), Python 3.11, Linux:
#
#   work done: False, exit codes: [0], join() returned True and raised nothing
#
# The wrapper around each worker takes KeyboardInterrupt for a message of its parent and drops it.
# Whoever starts workers by it has to look whether their work is there.
#
# Ends with 0 if it is still so, with 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.3.5
cat > "$work/interrupted.py" <<'PYTHON'
import os
import signal
import sys
from pathlib import Path

from torch.multiprocessing.spawn import start_processes


def work(number: int, done: str) -> None:
    os.kill(os.getpid(), signal.SIGINT)  # as `kill -INT` of this one process does
    Path(done).touch()


if __name__ == "__main__":
    done = Path(sys.argv[1])
    context = start_processes(work, args=(str(done),), nprocs=1, join=False, start_method="spawn")
    joined = context.join()
    codes = [process.exitcode for process in context.processes]
    print(
        f"work done: {done.exists()}, exit codes: {codes}, join() returned {joined} "
        "and raised nothing"
    )
PYTHON
said=$("$work/venv/bin/python" "$work/interrupted.py" "$work/done")
echo "$said"
test "$said" = "work done: False, exit codes: [0], join() returned True and raised nothing"
