"""``make fuzz``: tests/op/test_fuzz.py with fresh draws, some 20,000 calls of each backend.

A backend's calls are drawn in batches, each in a process of its own and from a seed of its own,
which is printed: ``--hypothesis-seed`` draws the same again. What fails stays on the screen.
"""

import argparse
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.checked.results import record

ROOT = Path(__file__).parents[1]
HOST_LIBRARY = ROOT / "build/cuda_host/_torch_ops_cuda_host.so"

ENVIRONMENTS = {
    "cpu": {"METAPOOL_REQUIRE_NATIVE": "1"},
    "reference": {},
    "cuda": {
        "METAPOOL_REQUIRE_NATIVE": "1",
        "METAPOOL_CUDA_HOST": str(HOST_LIBRARY),
        "METAPOOL_HOST_ORDER": "random",
    },
    "triton": {"TRITON_INTERPRET": "1"},
}
"""What makes a backend run on this machine: CUDA as threads on the CPU, Triton interpreted."""

# Of a batch, these two draw a half each; the others as many as one of them, or fewer.
JUDGED = ("test_forward_and_backward", "test_any_data")


@dataclass
class Batch:
    """One process: what it drew and whether it found something."""

    backend: str
    seed: int
    examples: int
    judged: int = 0
    others: int = 0
    failed: bool = False
    output: str = ""


def run(batch: Batch) -> Batch:
    """Draw a batch; the numbers are those that hypothesis reports of itself."""
    environment = os.environ | ENVIRONMENTS[batch.backend]
    environment["METAPOOL_FUZZ"] = str(-(-batch.examples // len(JUDGED)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--hypothesis-show-statistics", f"--hypothesis-seed={batch.seed}"]
    command += ["-k", f"{batch.backend}]", "tests/op/test_fuzz.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    batch.output = done.stdout + done.stderr
    batch.failed = done.returncode != 0
    for name, text in re.findall(r"::(\w+)\[\w+\]:\n(.*?)(?=\n\S|\Z)", batch.output, re.DOTALL):
        drawn = sum(map(int, re.findall(r"(\d+) passing\b", text)))
        if name in JUDGED:
            batch.judged += drawn
        else:
            batch.others += drawn
    return batch


def batches(backends: list[str], examples: int, size: int) -> list[Batch]:
    """All of them, the backends in turn, so that a run that is broken off has some of each."""
    rounds = -(-examples // size)
    seeds = random.SystemRandom()
    return [
        Batch(backend, seeds.randrange(2**32), min(size, examples - size * i))
        for i in range(rounds)
        for backend in backends
    ]


def main() -> int:
    """Draw, report each batch, and write what was drawn in all."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000, help="of each backend")
    parser.add_argument("--batch", type=int, default=1000, help="examples of one process")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--backends", nargs="+", choices=ENVIRONMENTS, default=[*ENVIRONMENTS])
    asked = parser.parse_args()
    if "cuda" in asked.backends:
        subprocess.run([sys.executable, "-m", "tests.cuda_host.build"], cwd=ROOT, check=True)
    total = {name: {"judged": 0, "others": 0, "failed": 0} for name in asked.backends}
    with ThreadPoolExecutor(asked.jobs) as pool:
        for batch in pool.map(run, batches(asked.backends, asked.examples, asked.batch)):
            counts = total[batch.backend]
            counts["judged"] += batch.judged
            counts["others"] += batch.others
            counts["failed"] += batch.failed
            if batch.failed:
                print(batch.output)
            line = f"{counts['judged']:,} + {counts['others']:,} calls of {batch.backend}"
            line += f", {counts['failed']} batches failed" if counts["failed"] else ""
            print(f"{line}; the last from seed {batch.seed}", flush=True)
            record(f"fuzz-{batch.backend}", line, ok=not counts["failed"])
    failed = any(counts["failed"] for counts in total.values())
    enough = all(counts["judged"] >= asked.examples for counts in total.values())
    return 0 if enough and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
