"""The machine and the settings that stand beside every figure."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version

import torch

from metapool_kernels import numpy_api
from tests.machine import cpu_facts, cpu_name

LANES = {"baseline": 4, "avx2": 8, "avx512": 16}
"""Floats in one vector of each instruction set."""


def clock_ghz() -> float | None:
    """The clock that the system states, at this moment; None where it does not."""
    stated = cpu_facts().get("cpu MHz")
    return None if stated is None else float(stated) / 1e3


def slug() -> str:
    """A folder name for this machine: the CPU and its cores."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", "", cpu_name().lower())
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return f"{words}-{numpy_api.active_isa()}-{os.cpu_count()}-cores"


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def conditions(allocator: str) -> dict[str, str]:
    """What to print above the figures; ``allocator`` in the words of ``timing.keep_memory``."""
    clock = clock_ghz()
    load = os.getloadavg()[0]
    return {
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores"
        + (f", {clock:.2f} GHz as stated" if clock else ""),
        "instruction set": f"{numpy_api.active_isa()} (torch: "
        f"{torch.backends.cpu.get_cpu_capability()})",
        "threads": f"{torch.get_num_threads()}, for ours and every peer",
        "waiting threads": f"GOMP_SPINCOUNT={os.environ.get('GOMP_SPINCOUNT')}",
        "allocator": allocator,
        "load before": f"{load:.1f} programs on {os.cpu_count()} cores"
        + (" (shared: figures come out too high)" if load > 0.5 else ""),
        "versions": f"torch {torch.__version__}, opencv {_package('opencv-python-headless')}, "
        f"python {platform.python_version()}",
    }
