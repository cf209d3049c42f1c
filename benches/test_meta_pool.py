"""The main cases of the report under pytest-benchmark, one peer after the other.

``pytest benches/ --benchmark-only`` takes under 5 minutes on two cores, with ``--quick`` under one.
"""

import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benches.cases import Case, Mode
from benches.measure import inputs, make_step, problem
from benches.peers import COPY, PEERS

SLOW_S, SLOW_ROUNDS, ROUNDS = 0.1, 3, 20


def test_meta_pool(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    """One peer in one case; a result that differs from the definition has no figures."""
    chosen = PEERS[peer]
    reason = problem(case, chosen)
    if reason is not None:
        pytest.fail(f"{peer} {reason}")
    mode = Mode.FORWARD if peer == COPY else case.mode
    step = make_step(chosen.make(case.names), mode, *inputs(case, chosen.layout))
    step()
    start = time.perf_counter()
    step()
    rounds = ROUNDS if time.perf_counter() - start < SLOW_S else SLOW_ROUNDS
    benchmark.group = str(case)
    benchmark.pedantic(step, rounds=rounds)
