"""Peak memory of a forward and backward beyond x, the output, its gradient and that of x.

``python -m benches.memory PEER K BATCH`` prints it in maps (bytes of x), from a process of its own:
a peak cannot be taken back where earlier calls have made a higher one.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benches.cases import LARGE, Case, Mode
from benches.measure import ROOT, inputs, make_step
from benches.peers import OURS, PEERS
from metapool_kernels import DEFAULT_CANDIDATES

CANDIDATES = {1: ("max_pool_3x3",), 3: DEFAULT_CANDIDATES[1:4], 7: DEFAULT_CANDIDATES}
"""The sets by their size K: skip_connect and the averages come last, as they keep less."""

MEASURED = (*OURS, "eager", "eager channels_last", "checkpointed eager", "nested max")
# glibc would raise the size from which blocks go back to the system, and keep what was freed
# before: a step would then take memory that is counted already.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def _kibibytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def _peak() -> int:
    """Most bytes that this process has had in memory."""
    if _STATUS.exists():
        return _kibibytes("VmHWM") * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _forget_peak() -> int:
    """Start the peak anew where the system can; the bytes in memory now."""
    if _RESET.exists():
        _RESET.write_text("5")
        return _kibibytes("VmRSS") * 1024
    return _peak()


def extra_maps(peer: str, count: int, batch: int) -> float:
    """The peak of one step in this process, over that before it, in maps; less out and grad_x."""
    case = Case(LARGE, Mode.BOTH, batch=batch)
    chosen = PEERS[peer]
    x, _, grad_out = inputs(case, chosen.layout)
    run = chosen.make(CANDIDATES[count])
    weights = torch.full((count,), 1 / count)
    one = (x[:1].clone(memory_format=chosen.layout), weights, grad_out[:1])
    make_step(run, Mode.BOTH, *one)()  # what a first call loads and starts stays out of it
    step = make_step(run, Mode.BOTH, x, weights, grad_out)
    before = _forget_peak()
    step()
    return (_peak() - before) / (x.numel() * x.element_size()) - 2


def measure_memory(quick: bool) -> dict[str, dict[str, float]]:
    """Extra maps by peer and K, each from a process that gives freed memory back at once."""
    batch, counts = (8, (1, 7)) if quick else (32, (1, 3, 7))
    peers = MEASURED[:3] if quick else MEASURED
    found: dict[str, dict[str, float]] = {}
    for peer in peers:
        for count in counts:
            done = subprocess.run(
                [sys.executable, "-m", "benches.memory", peer, str(count), str(batch)],
                cwd=ROOT,
                env={**os.environ, **_ALLOCATOR},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found.setdefault(peer, {})[f"K = {count}"] = float(done.stdout)
    return found


if __name__ == "__main__":
    print(extra_maps(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
