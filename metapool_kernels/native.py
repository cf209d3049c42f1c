"""The compiled parts of the package: loaded once, or the reason why they are not."""

import importlib
import json
import platform
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_HERE = Path(__file__).parent
_BUILD_FILE = _HERE / "_build.json"


def build_facts() -> dict[str, Any]:
    """What setup.py wrote down: per part, how it was built or why it was not."""
    if not _BUILD_FILE.exists():
        return {}
    facts: dict[str, Any] = json.loads(_BUILD_FILE.read_text())
    return facts


def _missing(part: str, what: str) -> str:
    facts = build_facts().get(part)
    reason = "never built" if facts is None else facts.get("skipped") or _lost(facts)
    return f"{what} missing ({reason}); mend that and run `pip install .` again"


def _lost(facts: dict[str, Any]) -> str:
    """Why a library that was built is not there."""
    built_for, here = facts.get("python"), platform.python_version()
    if built_for is None or built_for.split(".")[:2] == here.split(".")[:2]:
        return "built, but the file is gone"
    return f"built for Python {built_for}, this is {here}"


def _load(library: Path, part: str, what: str) -> str | None:
    if not library.exists():
        return _missing(part, f"{what} are")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = error.__cause__ or error  # torch names the library, and the linker the reason
        return f"{what} do not load: {reason}; build them again with `pip install .`"
    return None


TORCH_OPS_PROBLEM = _load(_HERE / "_torch_ops.so", "torch_ops", "the compiled kernels")
"""None where the CPU kernels are registered with torch, else the reason why they are not."""

CUDA_OPS_PROBLEM = _load(_HERE / "_torch_ops_cuda.so", "cuda", "the CUDA kernels")
"""None where the CUDA kernels are registered with torch, else the reason why they are not. They
load without a driver, and under a torch without CUDA."""


@cache
def numpy_ops() -> ModuleType:
    """The pybind11 module behind :mod:`metapool_kernels.numpy_api`.

    Raises:
        RuntimeError: it was not built for this Python; says why and how to get it.
    """
    try:
        return importlib.import_module("metapool_kernels._numpy_ops")
    except ModuleNotFoundError as error:
        raise RuntimeError(_missing("numpy_ops", "the compiled NumPy module is")) from error
    except ImportError as error:
        raise RuntimeError(f"the compiled NumPy module does not load: {error}") from error
