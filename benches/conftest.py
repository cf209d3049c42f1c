"""``--quick``, the cases, and the report's table of ratios after the benchmarks."""

from collections import defaultdict
from typing import Any

import pytest

from benches import tables
from benches.cases import Case, benchmark_cases
from benches.conditions import conditions
from benches.figures import rows
from benches.measure import Result
from benches.peers import COPY, peers_for
from benches.timing import Times, keep_memory

_ALLOCATOR = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register our options."""
    parser.addoption("--quick", action="store_true", help="small batches: under a minute in all")
    parser.addoption(
        "--system-malloc", action="store_true", help="leave the memory allocator as it is"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set the allocator once, before anything is measured."""
    left = config.getoption("--system-malloc")
    config.stash[_ALLOCATOR] = "as it is" if left else keep_memory()


def _cases(config: pytest.Config) -> dict[str, Case]:
    return {str(case): case for case in benchmark_cases(bool(config.getoption("--quick")))}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case with every peer that suits it, both by name."""
    if "peer" in metafunc.fixturenames:
        pairs = [
            (name, peer)
            for name, case in _cases(metafunc.config).items()
            for peer in peers_for(case)
        ]
        metafunc.parametrize("case_name, peer", pairs)


@pytest.fixture
def case(request: pytest.FixtureRequest, case_name: str) -> Case:
    """The case of that name."""
    return _cases(request.config)[case_name]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the conditions, and ours over the copy's and the peers' times."""
    session = getattr(config, "_benchmarksession", None)
    times: dict[str, dict[str, Times]] = defaultdict(dict)
    for benchmark in getattr(session, "benchmarks", ()):
        if not benchmark.has_error and "peer" in benchmark.params:
            name, peer = benchmark.params["case_name"], benchmark.params["peer"]
            times[name][peer] = Times.of(benchmark.stats.data)
    results = [
        Result(case, times[name], {})
        for name, case in _cases(config).items()
        if COPY in times.get(name, ())
    ]
    if not results:
        return
    terminalreporter.section("ratios; make bench-report measures in turn, and more")
    for about, text in conditions(config.stash[_ALLOCATOR]).items():
        terminalreporter.write_line(f"{about}: {text}")
    for line in tables.ours_table(rows(results)):
        terminalreporter.write_line(line)
