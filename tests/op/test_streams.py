"""Square windows on many planes, which the CPU kernels stream: every set of small windows, wide
ones, planes that are handled as a whole, in rings of lines and in strips, and what makes them start
over."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from tests import cases, judge
from tests.cases import CANDIDATES, SHAPES, Case

WINDOWS = (3, 5, 7)
SETS = [
    tuple(f"{kind}_pool_{window}x{window}" for window in windows)
    for kind in ("avg", "max")
    for count in range(len(WINDOWS) + 1)
    for windows in combinations(WINDOWS, count)
]
AVERAGES, MAXIMA = SETS[: len(SETS) // 2], SETS[len(SETS) // 2 :]

SIZES = {
    "whole": ((2, 19, 32, 32), "the largest plane that is converted as a whole, and a rest"),
    "ring": ((1, 24, 25, 45), "lines in a ring, all rows in one chunk"),
    "chunks": ((1, 16, 90, 57), "several chunks, columns on their way from one to the next"),
    "wide": ((1, 8, 41, 250), "chunks of few lines"),
    "strips": ((1, 16, 72, 21), "a plane cut into tasks that share lines"),
    "tall": ((16, 17, 60, 16), "planes as a whole, in two chunks"),
    "largest": ((16, 17, 70, 20), "the largest ring, in two chunks"),
    "wide_rows": ((1, 16, 2, 1500), "rows that do not fit the first cache"),
}


@pytest.mark.parametrize("skip", [(), ("skip_connect",)], ids=["", "skip"])
@pytest.mark.parametrize("maxima", MAXIMA, ids=str)
@pytest.mark.parametrize("averages", AVERAGES, ids=str)
def test_every_set(
    native: str, averages: tuple[str, ...], maxima: tuple[str, ...], skip: tuple[str, ...]
) -> None:
    candidates = (*maxima, *skip, *averages) or ("none",)
    for layout in cases.NATIVE_LAYOUTS:
        for size in ((1, 17, 9, 8), (2, 9, 2, 2)):
            for counted in (True, False) if averages else (True,):
                case = Case(
                    size, layout=layout, data="relu6", candidates=candidates,
                    count_include_pad=counted,
                )  # fmt: skip
                judge.judge(judge.fused(native), case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize(
    ("data", "alpha", "dtype"),
    [
        ("relu6", "nck", torch.float32),
        ("distinct", "k", torch.float32),
        ("equal", "ck", torch.float32),
        ("relu6", "k", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(
    native: str, size: str, data: str, alpha: str, dtype: torch.dtype, layout: str
) -> None:
    judge.judge(judge.fused(native), Case(SIZES[size][0], dtype, layout, data, alpha=alpha))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_normalised_sizes(native: str, size: str, layout: str, dtype: torch.dtype) -> None:
    """Moments and products of strips, and fields of what their neighbours send."""
    case = Case(SIZES[size][0], dtype, layout, "relu6", alpha="nck", form="normalized")
    judge.judge(judge.fused(native), case)


WIDE = [
    *((f"max_pool_{size}x{size}",) for size in (9, 11, 13, 15)),
    (*CANDIDATES["pyramid"], "avg_pool_3x3", "avg_pool_7x7"),
    ("max_pool_3x3", "max_pool_7x7", "max_pool_11x11", "max_pool_15x15"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["mix", "stack"])
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("candidates", WIDE, ids=str)
@pytest.mark.parametrize("size", [*SIZES, "wide strips", "under_5", "row", "column"])
def test_wide_windows(
    native: str, size: str, candidates: tuple[str, ...], layout: str, form: str
) -> None:
    shape = (1, 16, 130, 21) if size == "wide strips" else (SIZES | SHAPES)[size][0]
    case = Case(
        shape, layout=layout, data="relu6", candidates=candidates, normalize=None, form=form
    )
    judge.judge(judge.fused(native), case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["mix", "stack", "normalized"])
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize(
    ("alpha", "dtype", "candidates"),
    [
        ("nck", torch.float32, CANDIDATES["default"]),
        ("k", torch.float16, CANDIDATES["avg"]),
        ("ck", torch.float32, ("avg_pool_3x3", "max_pool_9x9", "avg_pool_7x7")),
    ],
    ids=["default", "averages", "wide"],
)
@pytest.mark.parametrize(
    "size", [*SIZES, "inside", "two", "under_5", "low", "narrow", "row", "column", "map7", "map14"]
)
def test_padding_that_does_not_count(
    native: str,
    size: str,
    alpha: str,
    dtype: torch.dtype,
    candidates: tuple[str, ...],
    layout: str,
    form: str,
) -> None:
    """Windows that end at one edge or at both, on maps with many pixels inside, one or none."""
    shape = (1, 16, 13, 13) if size == "inside" else (SIZES | SHAPES)[size][0]
    case = Case(
        shape, dtype, layout, "relu6", candidates, alpha=alpha, form=form, count_include_pad=False
    )
    judge.judge(judge.fused(native), case)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", ["first", "middle", "last"])
@pytest.mark.parametrize("where", ["x", "grad_out"])
@pytest.mark.parametrize("size", ["whole", "ring", "chunks", "strips"])
def test_one_value_that_is_not_finite(
    native: str, size: str, where: str, at: str, value: float
) -> None:
    """By then part of the results may have been written; all of them have to be done again, also
    the share of the planes beside that one, and of strips with their neighbours."""
    for candidates, counted in (
        ("default", True),
        ("max", True),  # averages would hide a NaN that maxima lose
        ("default", False),
        ("avg", False),
    ):
        case = Case(
            SIZES[size][0], data="relu6", alpha="nck", candidates=CANDIDATES[candidates],
            count_include_pad=counted,
        )  # fmt: skip
        x, alpha, grad_out = case.tensors()
        plane = (x if where == "x" else grad_out)[-1, -1].view(-1)
        plane[{"first": 0, "middle": plane.numel() // 2, "last": -1}[at]] = value
        got = judge.run(judge.fused(native), case, x, alpha, grad_out)
        right = judge.run(judge.truth, case, x, alpha, grad_out)
        for name, result in got.items():
            expected = right[name].to(result.dtype)
            if name == "grad_alpha":  # that of the plane itself: infinities may cancel to NaN
                result, expected = result.flatten(0, 1)[:-1], expected.flatten(0, 1)[:-1]
            scale = expected[expected.isfinite()].abs().max().item()
            torch.testing.assert_close(
                result, expected, rtol=1e-5, atol=1e-5 * scale, equal_nan=True
            )


@pytest.mark.usefixtures("threads")
def test_empty_lanes_hold_nothing_of_the_planes_before(native: str) -> None:
    """The last planes have a task to themselves, in memory that others have used before."""
    case = Case((1, 24, 80, 60), data="relu6")
    x, alpha, grad_out = case.tensors()
    x[:, 8:16] = torch.nan
    grad_out[:, 8:16] = torch.inf
    alone = _of_last_planes(native, case, (x[:, 16:], alpha, grad_out[:, 16:]))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = _of_last_planes(native, case, (x, alpha, grad_out))
        for a, b in zip(got, alone, strict=True):
            assert torch.equal(a, b), f"{threads} threads"


def _of_last_planes(
    native: str, case: Case, tensors: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    x, alpha, grad_out = tensors
    got = judge.run(judge.fused(native), case, x, alpha, grad_out, ("out", "grad_x"))
    return [judge.bits(result[:, -8:]) for result in got.values()]
