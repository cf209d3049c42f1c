"""The Triton kernels compiled for GPUs that need not be there, and what their machine code says."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from metapool_kernels import DEFAULT_CANDIDATES, pool_candidates
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.layout import memory_format
from metapool_kernels.spec import PoolSpec
from tests import cases
from tests.backends import INTERPRETED
from tests.recorded import Ratchet, assert_no_worse, minor

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton

from benches.machine_code import Kernel, compile_call, lower_call
from metapool_kernels._triton import launch

FIGURES = Path(__file__).parent / "machine_code.json"
"""Registers and instructions of each kernel, and the bytes that it spills.

``METAPOOL_WRITE_RATCHET=1 pytest tests/triton/test_machine_code.py`` writes them again.
"""

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a program can have."""

AVG = pool_candidates(kinds=("avg",), skip=False)

Size = tuple[int, int, int, int]


def _call(
    *,
    size: Size,
    backward: bool = False,
    candidates: tuple[str, ...] = DEFAULT_CANDIDATES,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    offset: int = 0,
    has_values: bool = False,
    stride: tuple[int, int] = (1, 1),
    weights: tuple[int, ...] = (),
    mask: tuple[bool, bool] = (True, True),
    form: str = "mix",
) -> Callable[[], object]:
    """A call of a kernel on tensors without memory, ``offset`` columns off an aligned address."""
    n, c, h, w = size
    x = torch.empty(
        (n, c, h, w + offset),
        dtype=dtype,
        device="meta",
        memory_format=memory_format(channels_last),
    )[..., offset:]
    codes = tuple(candidate.code for candidate in parse_candidates(candidates))
    spec = PoolSpec(codes, stride, True, channels_last, "triton")
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    alpha = torch.empty((*weights, len(codes)), dtype=accumulate, device="meta")
    values = x if has_values else None
    grad_out = x[..., :: stride[0], :: stride[1]]
    shifts = torch.empty((c, len(codes)), dtype=accumulate, device="meta")
    if backward:
        grads = torch.cat([grad_out] * len(codes), 1)
        return {
            "mix": lambda: launch.meta_pool_bwd(grad_out, x, alpha, values, spec, mask),
            "stack": lambda: launch.meta_pool_bwd(grads, x, None, values, spec, mask),
            "fields": lambda: launch.affine_bwd(grad_out, x, *[shifts] * 4, spec),
        }[form]
    terms = torch.empty((2, 1 + 3 * len(codes), n * c * w), dtype=accumulate, device="meta")
    sums = torch.empty((n, c, len(codes), 2), dtype=torch.float64, device="meta")
    forms: dict[str, Callable[[], object]] = {
        "mix": lambda: launch.meta_pool_fwd(x, alpha, values, spec),
        "stack": lambda: launch.meta_pool_fwd(x, None, values, spec),
        "constants": lambda: launch.affine_fwd(x, shifts, shifts[:, :1], spec),
        "moments": lambda: launch._forward("moments", x, spec),
        "products": lambda: launch._forward("products", x, spec, weights=shifts, grad_out=grad_out),
        "sums of moments": lambda: launch.put_together("moments", terms, sums, h * w, spec),
        "sums of products": lambda: launch.put_together("products", terms, sums, h * w, spec),
    }
    return forms[form]


BIG, LOW14, LOW7 = (32, 96, 56, 56), (32, 384, 14, 14), (32, 960, 7, 7)
ALONE = {
    "averages": AVG,
    "maxima": ("max_pool_3x3", "max_pool_7x7"),
    "skip": ("skip_connect",),
    "none": ("none",),
}
HUGE = (2**17, 2**15, 16, 16)
BF16 = torch.bfloat16

CALLS: dict[str, tuple[bool, Callable[[], object]]] = {
    name: ("backward" in about, _call(**about))
    for name, about in {
        "forward, vectors of four": {"size": BIG},
        "forward, vectors of four, bfloat16": {"size": BIG, "dtype": BF16},
        "forward, not aligned": {"size": (32, 96, 57, 57), "offset": 1},
        "forward, 14²": {"size": LOW14},
        "forward, 7²": {"size": LOW7},
        "forward, channels_last": {"size": BIG, "channels_last": True},
        "forward, averages, bfloat16": {"size": BIG, "candidates": AVG, "dtype": BF16},
        "forward of values": {"size": LOW14, "has_values": True},
        "forward, float64, weights by plane": {
            "size": LOW14,
            "dtype": torch.float64,
            "weights": (32, 384),
        },
        "forward, side by side": {"size": BIG, "form": "stack"},
        "forward, constants, 14²": {"size": LOW14, "form": "constants"},
        "forward, moments": {"size": BIG, "form": "moments"},
        "forward, moments, channels_last": {"size": BIG, "form": "moments", "channels_last": True},
        "forward, products, 7²": {"size": LOW7, "form": "products"},
        "backward, 56²": {"size": BIG, "backward": True},
        "backward, tiles": {"size": (32, 32, 112, 112), "backward": True},
        "backward, 28², bfloat16": {"size": (32, 144, 28, 28), "dtype": BF16, "backward": True},
        "backward, 7²": {"size": LOW7, "backward": True},
        "backward, channels_last": {"size": LOW7, "channels_last": True, "backward": True},
        "backward, averages": {"size": BIG, "candidates": AVG, "backward": True},
        "backward of values": {"size": LOW7, "has_values": True, "backward": True},
        "backward, stride 2": {
            "size": (32, 96, 28, 28),
            "candidates": AVG,
            "stride": (2, 2),
            "backward": True,
        },
        **{
            f"backward, {names} alone, {wanted} alone": {
                "size": (32, 96, 40, 40),
                "candidates": candidates,
                "mask": mask,
                "backward": True,
            }
            for names, candidates in ALONE.items()
            for wanted, mask in {"x": (True, False), "weights": (False, True)}.items()
        },
        "backward, side by side": {"size": BIG, "form": "stack", "backward": True},
        "backward, side by side, averages": {
            "size": BIG,
            "candidates": AVG,
            "form": "stack",
            "backward": True,
        },
        "backward of fields, averages": {
            "size": BIG,
            "candidates": AVG,
            "form": "fields",
            "backward": True,
        },
        "backward of fields": {"size": BIG, "form": "fields", "backward": True},
        "backward of fields, 14²": {"size": LOW14, "form": "fields", "backward": True},
        "backward of fields, channels_last": {
            "size": BIG,
            "form": "fields",
            "channels_last": True,
            "backward": True,
        },
        "forward, 64-bit lanes": {"size": HUGE},
        "backward, 64-bit planes": {"size": HUGE, "backward": True},
    }.items()
}

ONLY_SM90 = {
    "forward of values",
    "forward, float64, weights by plane",
    "forward, side by side",
    "forward, constants, 14²",
    "forward, moments",
    "forward, moments, channels_last",
    "forward, products, 7²",
    "backward of values",
    "backward, side by side",
    "backward, side by side, averages",
    "backward of fields, averages",
    "backward of fields",
    "backward of fields, 14²",
    "backward of fields, channels_last",
    "backward, stride 2",
    "backward, channels_last",
    "forward, 64-bit lanes",
    "backward, 64-bit planes",
}

QUICK = {"forward, vectors of four", "backward, averages"}
"""Compiled for every architecture even where the slow tests do not run."""
FIRST = {*QUICK, "forward, averages, bfloat16", "backward, maxima alone, x alone"}
"""With these, one of each kind: by `make test` for sm_90. Others take up to half a minute."""


def _marks(name: str, capability: int) -> tuple[pytest.MarkDecorator, ...]:
    if capability != 90 and name not in QUICK:
        return (pytest.mark.slow,)
    return () if capability == 90 and name in FIRST else (pytest.mark.costly,)


KERNELS = [
    pytest.param(name, capability, id=f"{name}-sm_{capability}", marks=_marks(name, capability))
    for name in CALLS
    for capability in (80, 90, 100)
    if capability == 90 or not (name in ONLY_SM90 or "alone" in name)
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", ["moments", "products"])
def test_sums(form: str, channels_last: bool) -> None:
    """What puts terms of lanes together."""
    call = _call(size=LOW14, form=f"sums of {form}", channels_last=channels_last)
    kernel = compile_call(call, backward=False, capability=90, kernel="meta_pool_sums_kernel")
    assert kernel.count("ATOM", "ATOMG", "ATOMS", "RED", "REDG") == 0
    assert kernel.stack == 0 and kernel.registers <= 64
    assert kernel.count("DADD", "DFMA") > 0, "sums are taken in float64"


@cache
def _kernel(name: str, capability: int) -> Kernel:
    backward, call = CALLS[name]
    return compile_call(call, backward=backward, capability=capability)


def _names(kernel: Kernel) -> str:
    return " ".join(kernel.instructions)


@pytest.mark.parametrize("name, capability", KERNELS)
def test_machine_code(name: str, capability: int) -> None:
    kernel = _kernel(name, capability)
    code = _names(kernel)
    assert kernel.count("ATOM", "ATOMG", "ATOMS", "RED", "REDG") == 0, (
        "atomics are not deterministic"
    )
    assert kernel.shared <= SHARED_MEMORY[capability]
    if not any(word in name for word in ("averages", "stride", "float64", "skip", "none")):
        assert "FMNMX.NAN" in code or "FMNMX3.NAN" in code, "a maximum has to pass NaN on"
    if "bfloat16" in name:
        assert "F2FP.BF16" in code and ".RZ" not in code, "bfloat16 is rounded to the nearest"


@pytest.mark.parametrize("name, capability", KERNELS)
def test_ratchet(name: str, capability: int) -> None:
    """How good the code is, which depends on the version of Triton."""
    kernel = _kernel(name, capability)
    elements = kernel.lanes * kernel.arguments["COLUMNS"] * kernel.arguments["UNROLL"]
    span = max(map(len, kernel.loops), default=len(kernel.instructions))
    found = {
        "registers": kernel.registers,
        "instructions": round(span * kernel.lanes / elements, 1),
        "spilled": kernel.stack,
    }
    ratchet = Ratchet(FIGURES, "Triton", minor(triton.__version__), capability)
    if ratchet.writes:
        ratchet.record(name, found)
        return
    kept = ratchet.kept(name)
    assert_no_worse(found, kept, *found)
    assert kept["spilled"] or kernel.count("LDL", "STL") == 0, "registers are spilled to memory"
    if "four" in name or ("averages" in name and "backward" not in name):
        wide, code = "64" if "bfloat16" in name else "128", _names(kernel)
        assert f"LDG.E.{wide}" in code and f"STG.E.{wide}" in code, "four columns at a time"


@pytest.mark.parametrize("has_values", [False, True], ids=["x", "values"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "names",
    [*cases.CANDIDATES.values(), ("max_pool_7x1",), ("max_pool_1x7",), ("max_pool_1x1",)],
    ids=" ".join,
)
def test_types_are_right(names: tuple[str, ...], backward: bool, has_values: bool) -> None:
    """The interpreter takes a number where the compiler wants a tensor."""
    high, low = ((2, 3, 20, 9), (1, 1)), ((2, 3, 7, 7), (2, 3))
    calls = [(high, (True, True)), (low, (True, True))]
    if backward:
        calls += [(high, (True, False)), (low, (False, True))]
    for (size, stride), mask in calls:
        call = _call(
            size=size, backward=backward, candidates=names, stride=stride, has_values=has_values,
            mask=mask,
        )  # fmt: skip
        assert "tt.store" in lower_call(call, backward=backward)


@pytest.mark.parametrize("form", ["stack", "constants", "moments", "products", "fields"])
@pytest.mark.parametrize("names", cases.CANDIDATES.values(), ids=" ".join)
def test_types_of_forms_are_right(names: tuple[str, ...], form: str) -> None:
    for size, stride in (((2, 3, 20, 9), (1, 1)), ((2, 3, 7, 7), (2, 3))):
        for dtype in (torch.float64, BF16):
            for backward in {"stack": (False, True), "fields": (True,)}.get(form, (False,)):
                call = _call(
                    size=size, candidates=names, stride=stride, dtype=dtype, form=form,
                    backward=backward,
                )  # fmt: skip
                assert "tt.store" in lower_call(call, backward=backward)
