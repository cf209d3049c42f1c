"""What a user waits for: from a fresh process to the end of the first step of a search.

With Triton's cache empty and filled, and with the kernels in CUDA. ``python -m
benches.gpu_check.first_step --once triton`` is one such process; it prints the seconds of each
part.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.gpu_check.worker import Row, work

_BEGAN = time.perf_counter()


def once(backend: str | None, device: str, ahead: bool) -> dict[str, float]:
    """Import, build, compile, step; the seconds of each part and of all."""
    times: dict[str, float] = {}

    def lap(part: str) -> None:
        times[part] = time.perf_counter() - _BEGAN - sum(times.values())

    # What takes long to import is part of what is measured.
    from benches.gpu_check.search_step import SearchStep
    from metapool_kernels.search.machine.kernels import compile_ahead

    lap("import")
    size = {"batch": 64, "side": 224} if device == "cuda" else {"batch": 2, "side": 64}
    step = SearchStep(device, backend, **size)
    lap("build")
    kernels = compile_ahead(step.rehearse, step.accelerator) if ahead else 0
    lap("compile")
    loss, _ = step()
    float(loss)  # waits for the device
    lap("first step")
    return times | {"kernels": kernels}


def _fresh(cache: str, device: str, *arguments: str) -> dict[str, Any]:
    """One such process, and the seconds from its start to its end."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benches.gpu_check.first_step", "--device", device, *arguments],
        env=os.environ | {"TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    parts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": seconds, "parts": parts}


def _rows(cache: Path, device: str) -> Iterator[Row]:
    if device != "cuda":
        yield "the CPU kernels", lambda: _fresh(str(cache), device, "--ahead")
        return
    triton = (str(cache), device, "--once", "triton", "--ahead")
    yield "CUDA", lambda: _fresh(str(cache), device, "--once", "cuda")
    yield "Triton, nothing on disk", lambda: _fresh(*triton)
    yield "Triton, from disk", lambda: _fresh(*triton)


def main() -> None:
    """All of them, or one process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--once", metavar="BACKEND")
    parser.add_argument("--ahead", action="store_true", help="compile with all cores before it")
    arguments = parser.parse_args()
    if arguments.once or arguments.ahead:
        print(json.dumps(once(arguments.once, arguments.device, arguments.ahead)))
        return
    with tempfile.TemporaryDirectory() as cache:
        work(_rows(Path(cache), arguments.device))


if __name__ == "__main__":
    main()
