"""Which backends the tests run on, and what happens where one is not available."""

import os
import shutil
import sys

import pytest
import torch

from metapool_kernels.dispatch import BACKENDS as PREDICATES
from tests import cuda_host

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs Triton's kernels in its interpreter, on CPU tensors."""

DEVICE = os.environ.get("METAPOOL_TEST_DEVICE", "cpu")
"""Where the op runs: ``cuda`` sends every case that is judged to the GPU and back."""

HOST_LIBRARY = os.environ.get("METAPOOL_CUDA_HOST")
"""The CUDA kernels compiled for the CPU by tests/cuda_host, which take CPU tensors."""


def _backends() -> tuple[str, ...]:
    if INTERPRETED:
        return ("triton",)
    if HOST_LIBRARY:
        return ("cuda",)
    return ("triton", "cuda") if DEVICE == "cuda" else ("reference", "cpu")


BACKENDS = _backends()
"""The backends that run there; the interpreter and the CUDA kernels on the CPU have a process of
their own, and time for little else."""

COMPILED = tuple(name for name in BACKENDS if name != "reference")
"""Those of them that have kernels."""

SAMPLED = "reference" not in BACKENDS
"""Whether only tests of one of BACKENDS run, or a share of them: each may take a second or more."""


if HOST_LIBRARY and BACKENDS == ("cuda",):
    cuda_host.load(HOST_LIBRARY)


CXX = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
"""The compiler that Inductor calls."""

needs_compiler = pytest.mark.skipif(
    shutil.which(CXX) is None, reason=f"Inductor needs a C++ compiler, and there is no {CXX}"
)


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
