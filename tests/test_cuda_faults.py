"""Faults planted into the CUDA kernels: the tests that run them on the CPU notice each one."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.backends import BACKENDS
from tests.cuda_host import build
from tests.mutation import builds

pytestmark = pytest.mark.skipif(
    "reference" not in BACKENDS, reason="the kernels' tests run in processes of their own here"
)

ROOT = Path(__file__).parents[1]

ROW_BARRIER = "share_row(2 + u % 2, oldest);\n        __syncthreads();"
PARTS_BARRIER = "__syncthreads();\n  shared[thread] = sum;"


class Fault(NamedTuple):
    """A piece of text that stands once in a file of csrc/cuda, and what takes its place.

    ``said`` is what the test that notices it says, ``order`` the threads' order in which it shows.
    """

    file: str
    right: str
    wrong: str
    said: str
    order: str = "forward"


# Those that forward is not compiled for come first.
FAULTS = {
    "no barrier between rows": Fault(
        "backward_lane.cuh",
        ROW_BARRIER,
        ROW_BARRIER.replace("__syncthreads();", ""),
        "grad_x: ",
    ),
    "barrier for lanes on the map": Fault(
        "backward_lane.cuh",
        ROW_BARRIER,
        ROW_BARRIER.replace("__sync", "if (lane.is_on_map) __sync"),
        "divergent barrier: thread",
    ),
    "one row too few above a strip": Fault(
        "backward_lane.cuh",
        "? lane.row_begin - 2 * kReach : 0;",
        "? lane.row_begin - 2 * kReach + 1 : 0;",
        "grad_x: error",
    ),
    "one lane too few beside a tile": Fault(
        "backward_shared.cuh",
        "kOverlap = (2 * kReach + kColumns - 1) / kColumns;",
        "kOverlap = (2 * kReach - 1) / kColumns;",
        "grad_x: error",
    ),
    "last row of some heights is not written": Fault(
        "backward_lane.cuh",
        "base <= lane.row_end + 2 * kReach;",
        "base < lane.row_end + 2 * kReach;",
        "grad_x: NaN",
    ),
    "sums that are not cleared": Fault("backward_lane.cuh", "clear_row(u);", ";", "grad_x: error"),
    "no careful run": Fault(
        "streamed_backward.cuh", "if (__syncthreads_or(is_special))", "if (false)", "grad_x: error"
    ),
    "no barrier before sums are replaced": Fault(
        "terms.cuh",
        PARTS_BARRIER,
        PARTS_BARRIER.replace("__syncthreads();", ""),
        "grad_alpha: error",
        order="reversed",
    ),
    "last term of a sum is dropped": Fault(
        "terms.cuh",
        "i < images * channels * of.parts;",
        "i + 1 < images * channels * of.parts;",
        "grad_alpha: error",
    ),
    "one row too few above a strip of forward": Fault(
        "streamed_forward.cuh",
        "? lane.row_begin - kReach : 0;",
        "? lane.row_begin - kReach + 1 : 0;",
        "out: error",
    ),
    "last column is not written": Fault(
        "lanes.cuh", "inside >> (kMargin + i) & 1)", "inside >> (kMargin + i + 1) & 1)", "out: NaN"
    ),
    "last of equal maxima": Fault("maxima.cuh", "right > left;", "right >= left;", "grad_x: error"),
    "last of equal maxima of a large window": Fault(
        "general.cuh", "if (right_wins(top, value))", "if (value >= top)", "grad_x: error"
    ),
}

TESTS = {
    "tests/test_forward.py::test_output_is_right": ["plain", "w16", "tall", "channels_last"],
    "tests/test_backward.py::test_gradients_are_right": (
        *["plain", "two", "tall", "wide-channels_last", "channels_last", "alpha_nck"],
        "no_skip-stride2",
    ),
    "tests/test_backward.py::test_gradient_of_x_is_right_for_any_data": (
        *["relu6", "relu6-largest", "nan", "minus_inf_block"],
    ),
}
"""Cases in float32 of all kernels, by the names of tests."""


class Copy(NamedTuple):
    """Sources that may be changed, and where they are built."""

    sources: Path
    folder: Path

    def replace(self, name: str, right: str, wrong: str) -> str:
        """Replace text that has to stand there once; returns what the file held before."""
        path = self.sources / "csrc/cuda" / name
        text = path.read_text()
        assert text.count(right) == 1, f"{name} has {right!r} {text.count(right)} times"
        path.write_text(text.replace(right, wrong))
        return text

    def build(self, name: str) -> Path:
        """A library of this name; the next one does not replace it."""
        flags = ["-O0", "-g0", "-w"]
        library = build.build(self.sources, self.folder, flags=flags)
        return library.rename(self.folder / f"{name}.so")

    def build_with(self, name: str) -> Path:
        """A library with a fault."""
        fault = FAULTS[name]
        before = self.replace(fault.file, fault.right, fault.wrong)
        try:
            return self.build(name)
        finally:
            (self.sources / "csrc/cuda" / fault.file).write_text(before)


class Libraries(NamedTuple):
    right: Path
    wrong: dict[str, Future[Path]]


@pytest.fixture(scope="module")
def libraries(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Libraries]:
    """For float32 alone, and not optimised; those with faults are built while others are tested."""
    folder = tmp_path_factory.mktemp("faults")
    copy = Copy(folder / "sources", folder / "build")
    for name in ("csrc", "python_bindings"):
        shutil.copytree(ROOT / name, copy.sources / name)
    builds.keep_float_alone(copy.sources)
    chosen = {item.name for item in request.session.items}
    names = [name for name in FAULTS if f"{test_a_fault_is_noticed.__name__}[{name}]" in chosen]
    with ThreadPoolExecutor(1) as builder:
        try:
            right = copy.build("right")
        except build.CannotBuildError as problem:
            pytest.skip(str(problem))
        yield Libraries(right, {name: builder.submit(copy.build_with, name) for name in names})
        builder.shutdown(cancel_futures=True)


def _run_tests(library: Path, order: str) -> str:
    """What pytest says of TESTS, up to the first that fails."""
    names = [f"{test}[cuda-{case}]" for test, some in TESTS.items() for case in some]
    environment = {**os.environ, "METAPOOL_CUDA_HOST": str(library), "METAPOOL_TEST_SHARE": "1"}
    environment["METAPOOL_HOST_ORDER"] = order
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
def test_no_fault(libraries: Libraries, order: str) -> None:
    said = _run_tests(libraries.right, order)
    assert re.search(rf"^{sum(map(len, TESTS.values()))} passed in ", said, re.M), said


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(libraries: Libraries, name: str) -> None:
    said = _run_tests(libraries.wrong[name].result(), FAULTS[name].order)
    assert re.search(r"^1 failed(, \d+ passed)? in ", said, re.M), said
    assert re.search(rf"^E +(Assertion|Runtime)Error: .*{FAULTS[name].said}", said, re.M), said
