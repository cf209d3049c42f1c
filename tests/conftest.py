"""Fixtures of every test file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.backends import BACKENDS, require

_PROFILE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("local", max_examples=150, **_PROFILE)
settings.register_profile("ci", max_examples=150, derandomize=True, **_PROFILE)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# Waiting threads cost small tensors ten times the work where cores are shared. One thread is
# enough: test_determinism.py shows that any number of them gives the same bits.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lies in this folder itself needs the op alone; folders below need more."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("kernel")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that takes CPU tensors, in turn."""
    return require(request.param)


@pytest.fixture
def native() -> str:
    """The compiled CPU backend, for what has no meaning on the reference."""
    return require("cpu")


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
