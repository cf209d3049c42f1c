"""The compiled parts of the package: loaded once, or the reason why they are not."""

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_HERE = Path(__file__).parent
_TORCH_OPS = _HERE / "_torch_ops.so"
_BUILD_FILE = _HERE / "_build.json"


def build_facts() -> dict[str, Any]:
    """What setup.py wrote down: per part, how it was built or why it was not."""
    if not _BUILD_FILE.exists():
        return {}
    facts: dict[str, Any] = json.loads(_BUILD_FILE.read_text())
    return facts


def _missing(part: str) -> str:
    reason = build_facts().get(part, {}).get("skipped", "they were never built")
    return f"the compiled kernels are missing ({reason}); mend that and run `pip install .` again"


def _load_torch_ops() -> str | None:
    if not _TORCH_OPS.exists():
        return _missing("torch_ops")
    try:
        torch.ops.load_library(_TORCH_OPS)
    except OSError as error:
        return f"the compiled kernels do not load: {error}; build them again with `pip install .`"
    return None


TORCH_OPS_PROBLEM = _load_torch_ops()
"""None where the CPU kernels are registered with torch, else the reason why they are not."""


@cache
def numpy_ops() -> ModuleType:
    """The pybind11 module behind :mod:`metapool_kernels.numpy_api`.

    Raises:
        RuntimeError: it was not built for this Python; says why and how to get it.
    """
    try:
        return importlib.import_module("metapool_kernels._numpy_ops")
    except ModuleNotFoundError as error:
        raise RuntimeError(_missing("numpy_ops")) from error
    except ImportError as error:
        raise RuntimeError(f"the compiled NumPy module does not load: {error}") from error
