"""The Triton kernels compiled for AMD's GPUs, on which nobody has run them yet."""

from functools import cache
from typing import Any

import pytest
import torch

from tests.backends import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benches.amd_code import WAVE, AmdKernel, compile_for_amd, read
from metapool_kernels._triton import launch
from metapool_kernels._triton.plan import Config
from tests.triton.test_machine_code import AVG, BIG, HUGE, LOW7, LOW14, _call

ARCHITECTURES = ("gfx942", "gfx950")
FEW = ("skip_connect", "max_pool_3x3", "avg_pool_3x3")

CALLS: dict[str, dict[str, Any]] = {
    f"{'backward' if backward else 'forward'}, {form}, {dtype}, {layout}": {
        "size": BIG,
        "candidates": FEW,
        "backward": backward,
        "form": form,
        "dtype": getattr(torch, dtype),
        "channels_last": layout == "channels_last",
    }
    for backward in (False, True)
    for form in ("mix", "stack")
    for dtype in ("float32", "bfloat16")
    for layout in ("contiguous", "channels_last")
}
CALLS |= {
    "forward, seven": {"size": BIG},
    "forward, seven, 7²": {"size": LOW7},
    "forward, moments": {"size": BIG, "form": "moments"},
    "forward, products, 7²": {"size": LOW7, "form": "products"},
    "forward, 64-bit lanes": {"size": HUGE, "candidates": FEW},
    "backward, seven": {"size": BIG, "backward": True},
    "backward, seven, 7²": {"size": LOW7, "backward": True},
    "backward, tiles": {"size": (32, 32, 112, 112), "candidates": FEW, "backward": True},
    "backward, averages": {"size": BIG, "candidates": AVG, "backward": True},
    "backward of fields, averages": {
        "size": BIG,
        "candidates": AVG,
        "form": "fields",
        "backward": True,
    },
    "backward of fields, 14²": {
        "size": LOW14,
        "candidates": FEW,
        "form": "fields",
        "backward": True,
    },
}

FIRST = {"forward, mix, float32, contiguous", "backward, stack, bfloat16, channels_last"}
"""By `make test`; others take up to half a minute."""
SLOW = {"backward, seven", "backward, seven, 7²"}


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    if name in SLOW:
        return (pytest.mark.slow,)
    return () if name in FIRST else (pytest.mark.costly,)


KERNELS = [
    pytest.param(name, architecture, id=f"{name}-{architecture}", marks=_marks(name))
    for name in CALLS
    for architecture in ARCHITECTURES
]


@cache
def _kernel(name: str, architecture: str) -> AmdKernel:
    about = CALLS[name]
    backward = about.get("backward", False)
    return compile_for_amd(_call(**about), backward=backward, architecture=architecture)


@pytest.mark.parametrize("name, architecture", KERNELS)
def test_machine_code(name: str, architecture: str) -> None:
    kernel = _kernel(name, architecture)
    assert kernel.spilled == kernel.scratch == kernel.count("scratch_") == 0
    assert kernel.registers <= 512, "those of a lane where a processor has one wave at a time"
    assert kernel.count("global_atomic", "buffer_atomic", "ds_add") == 0, (
        "atomics are not deterministic"
    )
    has_maxima = "averages" not in name
    if architecture == "gfx950":
        assert (kernel.count("v_maximum3_f32") > 0) == has_maxima, "a maximum passes NaN on"
    else:
        # Its maximum drops NaN, for which the operands are compared.
        assert (kernel.count("v_max_f32") > 0) == has_maxima
        compared = kernel.count("v_cmp_o_f32", "v_cmp_u_f32")
        assert compared > 0 or not has_maxima, "a maximum passes NaN on"
    if "bfloat16" in name and architecture == "gfx950":
        assert kernel.count("v_cvt_pk_bf16_f32") > 0, "rounded to the nearest"
    if "forward" in name and "contiguous" in name:
        words = 2 if "bfloat16" in name else 4
        for access in ("load", "store"):
            wide = [f"{kind}_{access}_dwordx{words}" for kind in ("global", "buffer")]
            assert kernel.count(*wide) >= 4, "four columns at a time"


@pytest.mark.parametrize("name, architecture", KERNELS)
def test_lanes_keep_to_their_wave(name: str, architecture: str) -> None:
    """Segments lie in waves: what lanes hand to each other goes through no memory.

    Between the waves of a program goes but the question of whether to run again.
    """
    kernel = _kernel(name, architecture)
    assert kernel.waves == 2
    if "backward" not in name:
        assert kernel.shared == kernel.count("ds_", "s_barrier") == 0
        return
    assert kernel.count("ds_bpermute_b32") > 0
    assert kernel.shared <= 4 * kernel.waves
    assert kernel.count("ds_read", "ds_write") <= 2 and kernel.count("s_barrier") <= 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("form", ["moments", "products"])
def test_sums(form: str, architecture: str) -> None:
    kernel = compile_for_amd(
        _call(size=LOW14, form=f"sums of {form}"),
        backward=False,
        architecture=architecture,
        kernel="meta_pool_sums_kernel",
    )
    assert kernel.spilled == kernel.scratch == 0 and kernel.registers <= 128
    assert kernel.count("v_add_f64", "v_fma_f64", "v_fmac_f64") > 0, "sums are taken in float64"


class _Properties:
    warp_size = WAVE


@pytest.mark.parametrize(
    "hip, device, warps", [(None, "cuda:3", 8), ("7.0", "cuda:3", 4), ("7.0", "meta", 8)]
)
def test_waves_hold_two_segments(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, device: str, warps: int
) -> None:
    """AMD's GPUs alone are asked what they have."""
    uncached = launch.lanes_of_warp.__wrapped__
    monkeypatch.setattr(launch, "lanes_of_warp", uncached)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert launch.warps_for(Config(2, 4, 8), torch.device(device)) == warps


def test_other_waves_are_told() -> None:
    text = "    .wavefront_size: 32\n    .vgpr_count: 7\n"
    with pytest.raises(ValueError, match="waves of 32 lanes"):
        read(text, waves=2, shared=0)
