"""A machine that lies: programs for benches/gpu_check whose rows hang, crash or say nothing true.

``python -m tests.house.lying NAME`` is one of them. The lying backend is for the real programs: in
their place ``python -m tests.house.lying backend figures`` runs them with kernels that are slightly
off.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches.gpu_check.worker import DEVICE_LOST, work


def _hang() -> dict[str, Any]:
    while True:
        time.sleep(1)


def _crash() -> dict[str, Any]:
    print("about to fault", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def _exit_quietly() -> dict[str, Any]:
    os._exit(0)


def _raise() -> dict[str, Any]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _lose_device() -> dict[str, Any]:
    os._exit(DEVICE_LOST)


def _start_a_child_that_hangs() -> dict[str, Any]:
    if os.fork() == 0:
        Path(os.environ["METAPOOL_CHILD"]).write_text(str(os.getpid()))
        time.sleep(3600)
    return _hang()


ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "good, first": lambda: {"seconds": 1.0},
    "hangs, 8 x 96 x 56 x 56, bfloat16, channels_last, triton": _hang,
    "crashes, 8 x 96 x 56 x 56, float32, NCHW, cuda": _crash,
    "raises": _raise,
    "loses the device": _lose_device,
    "says nothing": dict,
    "leaves quietly": _exit_quietly,
    "good, last": lambda: {"seconds": 2.0},
}


def _die() -> None:
    sys.exit("no module named something")


def _lie(x: Any, *_: Any, **__: Any) -> Any:
    """What the kernels would give, and a thousandth more."""
    from metapool_kernels import fused_meta_pool

    return fused_meta_pool(x, *_, **{**__, "backend": "reference"}) * 1.001


def main() -> None:
    """Lie."""
    name = sys.argv[1]
    if name == "rows":
        work(ROWS.items())
    elif name == "child":
        work([("has a child", _start_a_child_that_hangs)])
    elif name == "start":
        _die()
    elif name == "slow":
        time.sleep(3600)
    elif name == "short":
        print("row 0")
        work([("row 0", lambda: {"seconds": 1.0})])
    elif name == "races":
        print("========= Error: Race reported between Write access and Read access", flush=True)
        work((f"row {i}", lambda: time.sleep(0.2) or {"seconds": 0.2}) for i in range(1000))
    elif name == "forever":
        work((f"row {i}", lambda: time.sleep(0.2) or {"seconds": 0.2}) for i in range(1000))
    else:
        from benches.gpu_check import figures

        figures.fused_meta_pool = _lie  # type: ignore[assignment]
        figures.GPU_BACKENDS = ("reference",)  # type: ignore[assignment]
        sys.argv = [name, "--device", "cpu"]
        figures.main()


if __name__ == "__main__":
    main()
