"""A plugin of pytest, ``-p benches.gpu_check.plugin``: each test is a row of the journal.

In a process that is started again, the tests run that are not over. ``--part-of 1/4`` takes a
quarter of all tests, for four processes beside each other; what failed in an earlier run comes
first.
"""

import os
import zlib
from collections.abc import Iterator

import pytest

from benches.gpu_check.journal import BEGUN, DONE, FAILED, PLANNED, Journal
from benches.gpu_check.worker import leave_if_lost

FAILED_BEFORE = "METAPOOL_FAILED_BEFORE"
"""Environment: the names of such tests, one a line."""

_failed: set[str] = set()
_skipped: dict[str, dict[str, str]] = {}
"""Tests of this process, the latter with the reason."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which part of the tests."""
    parser.addoption("--part-of", default="0/1", help="such as 1/4, counted from 0")
    parser.addoption("--of-backend", help="only tests that have this backend for a parameter")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is over or belongs to another process."""
    part, parts = map(int, config.getoption("--part-of").split("/"))
    backend = config.getoption("--of-backend")
    items[:] = [
        item
        for item in items
        if _number(item) % parts == part and (backend is None or backend in _parameters(item))
    ]
    failed = os.environ.get(FAILED_BEFORE, "").splitlines()
    # The time may not do for all of them: in an order that mixes what they are about.
    items.sort(key=lambda item: (item.nodeid not in failed, _number(item)))
    journal = Journal.of_environment()
    if journal is not None:
        journal.write("", PLANNED, rows=[item.nodeid for item in items])
        ended = journal.ended()
        items[:] = [item for item in items if item.nodeid not in ended]


def _parameters(item: pytest.Item) -> list[object]:
    call = getattr(item, "callspec", None)
    return [value for value in call.params.values() if isinstance(value, str)] if call else []


def _number(item: pytest.Item) -> int:
    return zlib.crc32(item.nodeid.encode())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Say which test runs."""
    journal = Journal.of_environment()
    if journal is not None:
        journal.write(item.nodeid, BEGUN)
    result = yield
    if journal is not None and item.nodeid not in _failed:
        journal.write(item.nodeid, DONE, **_skipped.get(item.nodeid, {}))
    leave_if_lost()
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down what failed."""
    journal = Journal.of_environment()
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped[report.nodeid] = {"skipped": report.longrepr[2]}
    if journal is not None and report.failed:
        _failed.add(report.nodeid)
        crash = getattr(report.longrepr, "reprcrash", None)
        text = report.longreprtext
        why = (crash.message if crash else text.strip())[:500] or "failed"
        journal.write(report.nodeid, FAILED, why=why, output=text[-1500:])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Failed tests are in the journal; the process itself has done what it should."""
    if session.exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.OK
