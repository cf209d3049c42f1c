"""Cases that nobody thought of, drawn by hypothesis; what it finds becomes a case by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metapool_kernels.candidates import MAX_WINDOW
from tests import cases, judge
from tests.backends import BACKENDS, require
from tests.cases import Case

ODD = st.integers(0, MAX_WINDOW // 2).map(lambda half: 2 * half + 1)
POOLINGS = st.builds(
    lambda kind, kh, kw: f"{kind}_pool_{kh}x{kw}", st.sampled_from(("avg", "max")), ODD, ODD
)
FINITE = sorted(set(cases.DATA) - set(cases.NON_FINITE) - {"huge"})


@st.composite
def drawn_cases(draw: st.DrawFn, data: list[str]) -> Case:
    """A small call with anything in it."""
    stride = draw(st.sampled_from((1, 1, 2, 3, (1, 2), (4, 1), (9, 9))))
    names = POOLINGS | st.just("none")
    if stride == 1:
        names = names | st.just("skip_connect")
    side = st.integers(1, 40) | st.integers(1, 9)
    size = draw(st.tuples(st.integers(0, 3), st.integers(1, 19), side, side))
    dtype = draw(st.sampled_from(cases.DTYPES))
    return Case(
        size=size,
        dtype=dtype,
        layout=draw(st.sampled_from(sorted(cases.LAYOUTS))),
        data=draw(st.sampled_from(data)),
        candidates=tuple(draw(st.lists(names, min_size=1, max_size=8))),
        stride=stride,
        count_include_pad=draw(st.booleans()),
        normalize=draw(st.sampled_from(("softmax", None))),
        alpha=draw(st.sampled_from(sorted(cases.ALPHA_SHAPES))),
        alpha_dtype=draw(st.sampled_from((None, torch.float32))),
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", BACKENDS)
@given(case=drawn_cases(FINITE))
def test_forward_and_backward(name: str, case: Case) -> None:
    judge.judge(judge.fused(require(name)), case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", BACKENDS)
@given(case=drawn_cases(sorted(cases.DATA)))
def test_any_data(name: str, case: Case) -> None:
    judge.judge(judge.fused(require(name)), case, ("grad_x",))
