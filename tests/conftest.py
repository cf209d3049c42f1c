"""Fixtures of every test file."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _pytest.junitxml import xml_key
from hypothesis import HealthCheck, settings

from metapool_kernels.native import numpy_ops
from tests import rooms, selection
from tests.backends import BACKENDS, INTERPRETED, SAMPLED, require, skip_or_fail
from tests.checked import results

_PROFILE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("local", max_examples=150, **_PROFILE)
settings.register_profile("ci", max_examples=170, derandomize=True, **_PROFILE)
# Where a small map takes a tenth of a second; still 500 calls in CI: in the interpreter few of them
# of second order, for CUDA's threads a third in each order.
settings.register_profile(
    "slow", max_examples=230 if INTERPRETED else 60, derandomize=True, **_PROFILE
)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("METAPOOL_FUZZ", "1")), print_blob=True, **_PROFILE
)


def _profile() -> str:
    if "METAPOOL_FUZZ" in os.environ:
        return "fuzz"
    return "slow" if SAMPLED else "ci" if os.environ.get("CI") else "local"


settings.load_profile(_profile())

# Waiting threads cost small tensors ten times the work where cores are shared. One thread is
# enough: op/test_determinism.py shows that any number of them gives the same bits.
torch.set_num_threads(1)

_OF_THE_OP = {Path(__file__).parent / room for room in rooms.OF_THE_OP}

collect_ignore = []
if INTERPRETED:
    from tests.triton import interpreter  # which needs NumPy

    interpreter.mend()
else:
    collect_ignore.append("triton/test_interpreter.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which tests run, where not all do."""
    parser.addoption("--part", choices=selection.PARTS, help=selection.__doc__)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A report says under what it was made, for tests/checked; one process writes it."""
    report = session.config.stash.get(xml_key, None)
    if report is not None:
        for name, value in results.stamp().items():
            report.add_global_property(name, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What lies in the rooms of the op needs that alone; the others need more.

    Tests marked devices, large or slow run where ``-m`` names them, and nowhere else; of the
    others, those of ``--part``.

    The interpreter takes a second for a small map, a GPU for every kernel that it has to compile,
    and CUDA's threads on the CPU take turns: of the tests of one of BACKENDS, those run whose names
    fall into METAPOOL_TEST_SHARE, a fraction.
    """
    for item in items:
        if item.path.parent in _OF_THE_OP:
            item.add_marker("kernel")
    for marker in ("devices", "large", "slow"):
        if marker not in config.option.markexpr:
            _keep(config, items, [item for item in items if not item.get_closest_marker(marker)])
    config.stash[selection.COLLECTED] = list(items)
    if part := config.getoption("part"):
        _keep(config, items, selection.part(items, part))
    if SAMPLED:
        share = float(os.environ.get("METAPOOL_TEST_SHARE", "1"))
        chosen = [item for item in items if _is_for_backend(item) and _is_in(share, item)]
        _keep(config, items, chosen)


def _keep(config: pytest.Config, items: list[pytest.Item], chosen: list[pytest.Item]) -> None:
    rest = set(items) - set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item in rest])
    items[:] = chosen


def _is_for_backend(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    values = call.params.values() if call else ()
    of_backend = any(isinstance(value, str) and value in BACKENDS for value in values)
    return of_backend or _is_always_run(item)


def _is_always_run(item: pytest.Item) -> bool:
    return item.get_closest_marker("every") is not None


def _is_in(share: float, item: pytest.Item) -> bool:
    """Whether a test runs: its name stands for a number from 0 to 1, the same in any room."""
    if INTERPRETED and share < 1 and item.get_closest_marker("many_calls") is not None:
        return False
    name = f"tests/{item.nodeid[item.nodeid.index(item.path.name) :]}"
    number = zlib.crc32(name.encode()) / 2**32
    return number < share or _is_always_run(item)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of this run, in turn."""
    return require(request.param)


@pytest.fixture
def native() -> str:
    """The compiled CPU backend, for what has no meaning on the reference."""
    return require("cpu")


@pytest.fixture
def numpy_module() -> None:
    """The compiled module behind the NumPy entry points."""
    try:
        numpy_ops()
    except RuntimeError as error:
        skip_or_fail(str(error))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN, so that an element nobody wrote shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back that the test changes."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
