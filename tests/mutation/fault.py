"""What a fault is, and which tests belong to the part of the project that it is planted in."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Area:
    """A part of the project: what has to be built again, and the tests that watch over it.

    The tests are those of the part, not of any fault: a fault may be noticed by every one of them.
    """

    tests: tuple[str, ...]
    """Arguments of pytest."""
    builds: str = ""
    """``cpu`` or ``cuda``, see builds.py; nothing for Python."""
    environment: Mapping[str, str] = field(default_factory=dict)


NOT_THE_DEFINITION = ("-k", "not reference")


def _files(*names: str, folder: str = "tests") -> tuple[str, ...]:
    return tuple(f"{folder}/test_{name}.py" for name in names)


KERNEL_TESTS = (
    *_files("forward", "backward", "opcheck", "layout", "streams", "determinism", "sweep", "fuzz"),
    *NOT_THE_DEFINITION,
)

# The library for the CPU has float32 alone: every other type would take as long again to build.
CUDA_TESTS = (
    *_files("forward", "backward", "opcheck", "layout"),
    *("-k", "cuda and not float64 and not float16 and not half and not opcheck"),
)

AREAS: dict[str, Area] = {
    "CPU kernels": Area(KERNEL_TESTS, builds="cpu"),
    "CPU dispatch": Area(KERNEL_TESTS, builds="cpu"),
    "bindings": Area((*_files("opcheck", "layout", "backward"), *NOT_THE_DEFINITION), builds="cpu"),
    "CUDA kernels": Area(CUDA_TESTS, "cuda", {"METAPOOL_TEST_SHARE": "0.25"}),
    "Triton kernels": Area(
        _files("forward", "backward", "opcheck", "layout"),
        environment={"TRITON_INTERPRET": "1", "METAPOOL_TEST_SHARE": "0.03"},
    ),
    "autograd": Area((*_files("double_backward", "func", "backward"), *NOT_THE_DEFINITION)),
    "ops": Area(_files("opcheck", "layout")),
    "dispatch": Area((*_files("bad_input", "build"), "-k", "not the_build_is_written_down")),
    "checks": Area((*_files("candidates", "bad_input"), *NOT_THE_DEFINITION)),
    "definition": Area(_files("forward", "layout", "modules")),
    "modules": Area(_files("modules")),
    "stopping rule": Area(_files("stopping", "search", folder="tests/search")),
    "bilevel step": Area(_files("bilevel", "steps", folder="tests/search")),
}
"""By name, in the order in which they are run: what takes longest comes first."""


@dataclass(frozen=True)
class Fault:
    """Text that stands once in a file, and what takes its place.

    A fault with a reason for being ``equivalent`` changes nothing that a test could see.
    """

    name: str
    area: str
    path: str
    right: str
    wrong: str
    equivalent: str = ""
