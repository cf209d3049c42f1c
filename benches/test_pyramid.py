"""Spatial pyramid pooling under pytest-benchmark, one way to do it after the other."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benches.layouts import LAYOUTS, MODES
from benches.pyramid import PYRAMIDS, SIZES, check, inputs, make_step

ROUNDS = 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramid(benchmark: BenchmarkFixture, name: str, mode: str, layout: str) -> None:
    """What differs from the windows as they are has no figures."""
    check((1, *SIZES[0][1:]), layout)
    benchmark.group = f"pyramid, {mode}, {layout}"
    benchmark.pedantic(make_step(PYRAMIDS[name], mode, inputs(SIZES[0], layout)), rounds=ROUNDS)
