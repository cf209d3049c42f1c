"""The compiled libraries for this machine: those that are there, the packed ones, or new ones."""

import argparse
import os
import subprocess
import sys
import time
from typing import Any

from benches.gpu_check import pack
from benches.gpu_check.worker import work


def _loads() -> str:
    """What a fresh process says of the CUDA kernels: nothing if they run on this GPU."""
    code = (
        "import torch\n"
        "from metapool_kernels.dispatch import BACKENDS\n"
        "print(BACKENDS['cuda'](torch.empty(1, device='cuda')) or '')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=pack.ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()[-500:]


def provide(capability: str) -> dict[str, Any]:
    """Install the pack if it fits, else build.

    Raises:
        RuntimeError: what is there then does not run on the GPU; says why.
    """
    began = time.perf_counter()
    why_not = pack.problem(capability)
    if why_not is None:
        pack.install()
    else:
        asked = {"METAPOOL_BUILD_CUDA": "1", "METAPOOL_CUDA_ARCHS": capability}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=pack.ROOT, env=os.environ | asked, check=True)
    if problem := _loads():
        raise RuntimeError(problem)
    origin = "packed" if why_not is None else f"built here, since of the pack: {why_not}"
    return {"libraries": origin, "seconds": time.perf_counter() - began}


def rehearse() -> dict[str, Any]:
    """The CUDA kernels compiled for the CPU."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tests.cuda_host.build"], cwd=pack.ROOT, check=True)
    return {"libraries": "for the CPU", "seconds": time.perf_counter() - began}


def main() -> None:
    """One row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", help="such as 90; without it, a rehearsal")
    capability = parser.parse_args().capability
    run = rehearse if capability is None else lambda: provide(capability)
    work([("libraries", run)])


if __name__ == "__main__":
    main()
