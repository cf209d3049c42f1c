"""Output and gradients at every width and number of planes across the boundaries of the kernels."""

from dataclasses import replace

import pytest

from tests import cases, judge
from tests.cases import Case


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", cases.SWEEP_CASES, ids=str)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("sweep", cases.SWEEPS)
def test_every_size(native: str, sweep: str, layout: str, case: Case) -> None:
    size_at, _ = cases.SWEEPS[sweep]
    wants = ("out", "grad_x") if case.data in cases.NON_FINITE else judge.ALL
    for number in cases.SWEEP:
        judge.judge(judge.fused(native), replace(case, size=size_at(number), layout=layout), wants)
