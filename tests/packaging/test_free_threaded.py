"""Calls on arrays from threads that no lock of Python's holds back.

Elsewhere the lock is given up inside a call alone; what comes before and after it runs at once on
threads of a free-threaded interpreter.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from metapool_kernels import DEFAULT_CANDIDATES, numpy_api
from tests.compatibility.interpreters import FREE_THREADED

pytestmark = pytest.mark.usefixtures("numpy_module")

ROOT = Path(__file__).parents[2]
LIMIT = 300
"""Seconds after which a process that does not end has failed."""

THREADS, ROUNDS = 8, 200
# So small that a call is little more than what comes before and after its work.
SIZES = ((1, 1, 2, 3), (2, 1, 3, 2), (1, 3, 1, 4), (1, 2, 4, 1))
Array = numpy_api.Array


def _calls(x: Array) -> list[bytes]:
    """The bits that each entry point finds."""
    weights = np.linspace(-1, 1, 7, dtype=x.dtype)
    out = numpy_api.meta_pool(x, weights)
    stack = numpy_api.multi_pool(x, DEFAULT_CANDIDATES)
    found = numpy_api.normalized_meta_pool(x, weights)
    results = (
        out,
        *numpy_api.meta_pool_grad(out, x, weights),
        stack,
        numpy_api.multi_pool_grad(stack, x, DEFAULT_CANDIDATES),
        found.out,
        *numpy_api.normalized_meta_pool_grad(out, x, weights),
    )
    return [array.tobytes() for array in results]


def test_eight_threads_at_once() -> None:
    """Each begins with another map than its neighbours, and all share these maps."""
    generator = np.random.default_rng(0)
    maps = [
        generator.standard_normal(size).astype(dtype)
        for size in SIZES
        for dtype in (np.float32, np.float64)
    ]
    expected = [_calls(x) for x in maps]
    start = threading.Barrier(THREADS)

    def work(number: int) -> bool:
        start.wait(LIMIT)
        order = ((number + i) % len(maps) for i in range(ROUNDS))
        return all(_calls(maps[i]) == expected[i] for i in order)

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [True] * THREADS


_IMPORT = """
import sys, torch, numpy
before = sys._is_gil_enabled()
import metapool_kernels
from metapool_kernels import DEFAULT_CANDIDATES, numpy_api
numpy_api.active_isa()
print(before, sys._is_gil_enabled())
"""


@pytest.mark.skipif(not FREE_THREADED, reason="this interpreter always has its lock")
def test_importing_leaves_the_lock_off() -> None:
    """A module that says nothing has it switched on for the whole process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _IMPORT], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=LIMIT, env=os.environ | {"PYTHON_GIL": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
