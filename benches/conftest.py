"""``--quick``, and a table of ratios after the benchmarks: to the copy and to the peers."""

import platform
from collections import defaultdict
from statistics import median
from typing import Any

import pytest
import torch

from benches.peers import COPY, EAGER, OURS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register ``--quick``."""
    parser.addoption("--quick", action="store_true", help="small batches: under a minute in all")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether the small version was asked for."""
    return bool(request.config.getoption("--quick"))


def _ratios(times: dict[str, float]) -> list[str]:
    peers = [name for name in times if name not in (*OURS, COPY)]
    best = min(peers, key=times.__getitem__)
    rows = [f"  {'':<22}{'median ms':>10}{'copies':>10}{'x eager':>10}{'x best peer':>13}"]
    for name, time in times.items():
        rows.append(
            f"  {name:<22}{time * 1e3:>10.2f}{time / times[COPY]:>10.1f}"
            f"{times[EAGER] / time:>10.1f}{times[best] / time:>13.1f}"
        )
    rows.append(f"  the best peer is {best}")
    return rows


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print, for each group, every time over the copy's and the peers' times over it."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for benchmark in getattr(session, "benchmarks", ()):
        if benchmark.has_error or "peer" not in benchmark.params:
            continue
        groups[benchmark.group][benchmark.params["peer"]] = median(benchmark.stats.data)
    if not groups:
        return
    terminalreporter.section("ratios")
    terminalreporter.write_line(
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
        "'x eager' says how many times faster than eager in the contiguous layout"
    )
    for group, times in groups.items():
        if EAGER in times and COPY in times:
            terminalreporter.write_line(group)
            for row in _ratios(times):
                terminalreporter.write_line(row)
