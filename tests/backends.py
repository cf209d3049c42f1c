"""Which backends the tests run on, and what happens where one is not available."""

import os

import pytest
import torch

from metapool_kernels.dispatch import BACKENDS as PREDICATES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs Triton's kernels in its interpreter, on CPU tensors."""

DEVICE = os.environ.get("METAPOOL_TEST_DEVICE", "cpu")
"""Where the op runs: ``cuda`` sends every case that is judged to the GPU and back."""

BACKENDS = ("triton",) if INTERPRETED or DEVICE == "cuda" else ("reference", "cpu")
"""The backends that run there; the interpreter has a process of its own, and time for little
else."""

SAMPLED = BACKENDS == ("triton",)
"""Whether only a share of the tests runs, because each takes a second or more."""


def native_is_required() -> bool:
    """Whether a missing compiled library is a failure (in CI) and not a reason to skip."""
    return os.environ.get("METAPOOL_REQUIRE_NATIVE") == "1"


def skip_or_fail(reason: str) -> None:
    """Leave the running test: failed where the compiled library is required, else skipped."""
    if native_is_required():
        pytest.fail(f"METAPOOL_REQUIRE_NATIVE=1, but {reason}")
    pytest.skip(reason)


def require(backend: str) -> str:
    """The name back, or the test ends here for the reason that the dispatcher gives."""
    reason = PREDICATES[backend](torch.empty(1, device=DEVICE))
    if reason is not None:
        skip_or_fail(f"backend {backend!r} is not available: {reason}")
    return backend
