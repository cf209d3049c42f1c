"""The mixed operation of DARTS under pytest-benchmark, ours beside what it stands for."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benches.layouts import LAYOUTS, MODES
from benches.normalized import MIXTURES, SIZE, check, inputs, make_step

ROUNDS = 5
SMALLER = (4, *SIZE[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MIXTURES)
def test_normalized(benchmark: BenchmarkFixture, name: str, mode: str, layout: str) -> None:
    """What differs from poolings and norms has no figures."""
    check((1, *SIZE[1:]), layout)
    benchmark.group = f"normalised mixture, {mode}, {layout}"
    benchmark.pedantic(make_step(MIXTURES[name], mode, inputs(SMALLER, layout)), rounds=ROUNDS)
