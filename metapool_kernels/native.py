"""The compiled library with the CPU kernels: loaded once, or the reason why it is not."""

import json
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_LIBRARY = _HERE / "_torch_ops.so"
_BUILD_FILE = _HERE / "_build.json"
_REBUILD = "build it with `pip install .` where a C++17 compiler is found"


def build_facts() -> dict[str, Any]:
    """What setup.py wrote down while building: compiler, instruction sets, what was left out."""
    if not _BUILD_FILE.exists():
        return {}
    facts: dict[str, Any] = json.loads(_BUILD_FILE.read_text())
    return facts


def _load() -> str | None:
    if not _LIBRARY.exists():
        reason = build_facts().get("torch_ops", {}).get("skipped", "it was never built")
        return f"the compiled kernels are missing ({reason}); {_REBUILD}"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the compiled kernels do not load ({error}); {_REBUILD}"
    return None


TORCH_OPS_PROBLEM = _load()
"""None where the CPU kernels are registered, else the reason why they are not."""
