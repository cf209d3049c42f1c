"""``python -m benches.import_time``: what `import metapool_kernels` takes after `import torch`.

Each figure is of an interpreter of its own, the first of which is left out: it writes bytecode.
"""

import argparse
import os
import subprocess
import sys

from benches.measure import ROOT
from benches.timing import Times
from tests.checked.results import record

AIM_MS = 50

_CODE = """
import time
import torch
start = time.perf_counter()
import metapool_kernels
print(time.perf_counter() - start)
"""


def measure(rounds: int) -> Times:
    """Seconds over torch's own, of so many interpreters."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", _CODE]
    seconds = []
    for _ in range(rounds + 1):
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True
        )
        seconds.append(float(done.stdout))
    return Times.of(seconds[1:])


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(prog="python -m benches.import_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interpreters that are started")
    times = measure(parser.parse_args().rounds)
    median, q1, q3 = (1e3 * value for value in (times.median, times.q1, times.q3))
    line = (
        f"import metapool_kernels after torch: {median:.1f} ms [{q1:.1f}, {q3:.1f}], "
        f"median [quartiles] of {times.calls}; the aim is under {AIM_MS} ms"
    )
    print(line)
    record("import-time", line)


if __name__ == "__main__":
    main()
