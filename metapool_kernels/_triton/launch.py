"""Calls of the kernels: on the device of their tensors, with the configuration of their regime."""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor

from metapool_kernels._triton.backward import meta_pool_bwd_kernel
from metapool_kernels._triton.forward import meta_pool_fwd_kernel
from metapool_kernels._triton.plan import (
    SEGMENT,
    Config,
    Layout,
    Regime,
    Tile,
    accumulator,
    backward_tile,
    configs,
    forward_tile,
    layout_of,
    pools_of,
    regime_of,
)
from metapool_kernels._triton.sums import meta_pool_sums_kernel
from metapool_kernels.layout import empty_map, output_size
from metapool_kernels.spec import PoolSpec


class Map(NamedTuple):
    """A map in memory as kernels take it.

    Strides are in elements; in a map that is read by vectors, in vectors (that of columns is 1).
    """

    data: Tensor
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int


def as_map(x: Tensor, vector: int) -> Map:
    """The map of a tensor of shape (N, C, H, W), to be read by vectors of so many elements."""
    n, c, h, w = x.stride()
    return Map(x, n // vector, c // vector, h // vector, w)


class Weights(NamedTuple):
    """Weights of shape (N, C, K) as kernels take them; a stride of 0 repeats."""

    data: Tensor
    stride_n: int
    stride_c: int
    stride_k: int


def as_weights(weights: Tensor) -> Weights:
    """The weights of a tensor of shape (K,), (C, K), (N, 1, K) or (N, C, K)."""
    strides = weights.stride()
    stride_n = strides[-3] if weights.dim() == 3 and weights.shape[-3] > 1 else 0
    stride_c = strides[-2] if weights.dim() >= 2 and weights.shape[-2] > 1 else 0
    return Weights(weights, stride_n, stride_c, strides[-1])


TERMS_AT_ONCE = 256
"""Lanes of planes whose terms a program adds up beside each other."""

_tuned: dict[tuple[torch.device, torch.dtype, Regime], Config] = {}


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` the current one, on which Triton launches."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@cache
def lanes_of_warp(device: torch.device) -> int:
    """How many lanes run in step: AMD's GPUs for computing have 64."""
    if torch.version.hip is None or device.type != "cuda":
        return SEGMENT
    lanes: int = torch.cuda.get_device_properties(device).warp_size
    return lanes


def warps_for(config: Config, device: torch.device) -> int:
    """Warps of the device that hold the segments of a program, a wave of 64 lanes two of them.

    With more of them lanes would be there twice, and meet in shared memory.
    """
    return config.num_warps * SEGMENT // lanes_of_warp(device)


def choose_config(x: Tensor, regime: Regime, run: Callable[[Config], object]) -> Config:
    """The default of a regime or, under ``METAPOOL_AUTOTUNE=1``, the fastest, measured once.

    Args:
        x: the input of the call.
        regime: of the call.
        run: runs it with a configuration.
    """
    choices = configs(regime)
    tunes = "METAPOOL_AUTOTUNE" in os.environ and os.environ["METAPOOL_AUTOTUNE"] == "1"
    if not tunes or x.device.type != "cuda":
        return choices[0]
    key = (x.device, x.dtype, regime)
    if key not in _tuned:
        if torch.cuda.is_current_stream_capturing():
            return choices[0]
        with on_device_of(x):
            times = [
                triton.testing.do_bench(lambda c=c: run(c), return_mode="median") for c in choices
            ]
        _tuned[key] = choices[times.index(min(times))]
    return _tuned[key]


@lru_cache(maxsize=4096)
def _constants(
    x: Layout, spec: PoolSpec, tile: Tile, *, has_values: bool, shares_weights: bool
) -> dict[str, Any]:
    """What both kernels are compiled for. Not to be changed: calls share it."""
    pools = pools_of(spec.candidates)
    h, w = x.shape[2:]
    return {
        "AVG": pools.avg,
        "MAX": pools.max,
        "NONE": pools.none,
        "COUNT": len(spec.candidates),
        "RADIUS_H": pools.radius_h,
        "RADIUS_W": pools.radius_w,
        "STRIDE_H": min(spec.stride[0], h),
        "STRIDE_W": min(spec.stride[1], w),
        "MERGED": spec.count_include_pad,
        "HAS_VALUES": has_values and bool(pools.max),
        "SHARED_WEIGHTS": shares_weights,
        "ACC": accumulator(x.dtype),
        "COLUMNS": tile.config.columns,
        "VECTOR": tile.vector > 1,
        "ONE_STRIP": tile.strips.number == 1,
        "HEIGHT": h if tile.is_low else 0,
        "UNROLL": tile.unroll,
        "enable_fp_fusion": True,
    }


def meta_pool_fwd(
    x: Tensor,
    weights: Tensor | None,
    values: Tensor | None,
    spec: PoolSpec,
    config: Config | None = None,
) -> Tensor:
    """:func:`metapool_kernels.ops.meta_pool_fwd` on the device of ``x``.

    ``config`` overrides the choice that is made for the call.
    """
    n, c, h, w = x.shape
    channels = c if weights is not None else len(spec.candidates) * c
    out = empty_map(x, (n, channels, *output_size((h, w), spec.stride)), spec.channels_last)
    if n == 0:
        return out
    form = "mix" if weights is not None else "stack"
    return _forward(form, x, spec, config, weights=weights, values=values, out=out)


def _forward(
    form: str,
    x: Tensor,
    spec: PoolSpec,
    config: Config | None = None,
    *,
    weights: Tensor | None = None,
    constants: Tensor | None = None,
    values: Tensor | None = None,
    grad_out: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Start the kernel of forward in one of its forms, and return what it writes.

    That is ``out``, or the terms of a sum, of shape (strips, terms, lanes), where there is none.
    """
    n, c, h, w = x.shape
    has_values = values is not None
    maps = tuple(layout_of(y) for y in (x, out, values, grad_out) if y is not None)
    if config is None:
        regime = regime_of(maps, spec, backward=False, has_values=has_values, form=form)
        config = choose_config(
            x,
            regime,
            lambda c: _forward(
                form, x, spec, c,
                weights=weights, constants=constants, values=values, grad_out=grad_out, out=out,
            ),
        )  # fmt: skip
    tile = forward_tile(maps, spec, config)
    shares_weights = weights is not None and weights.dim() == 1
    constexprs = _constants(
        maps[0], spec, tile, has_values=has_values, shares_weights=shares_weights
    )
    lanes = n * c * tile.groups
    if out is None:
        each = 3 if form == "moments" else 1
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        terms = 1 + len(spec.candidates) * each
        written = x.new_empty((tile.strips.number, terms, lanes), dtype=dtype)
    h_out, w_out = output_size((h, w), spec.stride)
    source = as_map(x, tile.vector)
    with on_device_of(x):
        meta_pool_fwd_kernel[(tile.programs,)](
            source,
            source if values is None else as_map(values, tile.vector),
            None if weights is None else as_weights(weights),
            None if constants is None else as_weights(constants),
            None if grad_out is None else as_map(grad_out, tile.vector),
            written if out is None else as_map(out, tile.vector),
            c,
            h,
            w,
            h_out,
            w_out,
            tile.groups,
            lanes,
            tile.strips.number,
            tile.strips.rows,
            **constexprs,
            FORM=form,
            CHANNELS_LAST=spec.channels_last,
            BLOCK=SEGMENT * config.num_warps,
            num_warps=warps_for(config, x.device),
        )
    return written if out is None else out


def affine_fwd(x: Tensor, weights: Tensor, constants: Tensor, spec: PoolSpec) -> Tensor:
    """:func:`metapool_kernels.moments.affine_fwd` on the device of ``x``."""
    n, c, h, w = x.shape
    out = empty_map(x, (n, c, *output_size((h, w), spec.stride)), spec.channels_last)
    if n == 0:
        return out
    return _forward("mix", x, spec, weights=weights, constants=constants, out=out)


def pool_moments(x: Tensor, spec: PoolSpec, config: Config | None = None) -> Tensor:
    """:func:`metapool_kernels.moments.pool_moments` on the device of ``x``."""
    return _sums("moments", x, spec, config)


def pool_products(
    grad_out: Tensor, x: Tensor, shifts: Tensor, spec: PoolSpec, config: Config | None = None
) -> Tensor:
    """:func:`metapool_kernels.moments.pool_products` on the device of ``x``."""
    return _sums("products", x, spec, config, weights=shifts, grad_out=grad_out)


def _sums(form: str, x: Tensor, spec: PoolSpec, config: Config | None, **tensors: Tensor) -> Tensor:
    """What the terms of all lanes amount to, (N, C, K, 2)."""
    n, c, h, w = x.shape
    count = len(spec.candidates)
    out = x.new_empty((n, c, count, 2), dtype=torch.float64)
    if n > 0:
        terms = _forward(form, x, spec, config, **tensors)
        put_together(form, terms, out, math.prod(output_size((h, w), spec.stride)), spec)
    return out


def put_together(form: str, terms: Tensor, out: Tensor, size: int, spec: PoolSpec) -> None:
    """Start the kernel that sums up terms of lanes into ``out``, (N, C, K, 2)."""
    n, c, count, _ = out.shape
    strips, _, lanes = terms.shape
    groups = lanes // (n * c)
    at_once = min(triton.next_power_of_2(groups), TERMS_AT_ONCE)
    planes = TERMS_AT_ONCE // at_once
    with on_device_of(out):
        meta_pool_sums_kernel[(triton.cdiv(n * c, planes) * count,)](
            terms,
            out,
            n * c,
            c,
            groups,
            strips,
            size,
            FORM=form,
            COUNT=count,
            CHANNELS_LAST=spec.channels_last,
            PLANES=planes,
            GROUPS=at_once,
            num_warps=4,
            enable_fp_fusion=True,
        )


def meta_pool_bwd(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor | None,
    values: Tensor | None,
    spec: PoolSpec,
    output_mask: tuple[bool, bool],
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`metapool_kernels.ops.meta_pool_bwd` on the device of ``x``.

    ``config`` overrides the choice that is made for the call.
    """
    form = "mix" if weights is not None else "stack"
    wants_values, wants_weights = output_mask[0], output_mask[1] and weights is not None
    grad_values = empty_map(x, x.shape, spec.channels_last) if wants_values else None
    parts = None
    if x.shape[0] > 0 and (wants_values or wants_weights):
        parts = _backward(
            form, grad_out, x, spec, config,
            weights=weights, values=values, grad_values=grad_values, wants_weights=wants_weights,
        )  # fmt: skip
    if weights is None or not wants_weights:
        grad_weights = (x if weights is None else weights).new_empty(0)
    else:
        grad_weights = weights.new_zeros(weights.shape) if parts is None else _total(parts, weights)
    return x.new_empty(0) if grad_values is None else grad_values, grad_weights


def affine_bwd(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    slopes: Tensor,
    shifts: Tensor,
    spec: PoolSpec,
    config: Config | None = None,
) -> Tensor:
    """:func:`metapool_kernels.moments.affine_bwd` on the device of ``x``."""
    grad_x = empty_map(x, x.shape, spec.channels_last)
    if x.shape[0] > 0:
        _backward(
            "fields", grad_out, x, spec, config,
            weights=weights, offsets=offsets, slopes=slopes, shifts=shifts, grad_values=grad_x,
        )  # fmt: skip
    return grad_x


def _backward(
    form: str,
    grad_out: Tensor,
    x: Tensor,
    spec: PoolSpec,
    config: Config | None = None,
    *,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    slopes: Tensor | None = None,
    shifts: Tensor | None = None,
    values: Tensor | None = None,
    grad_values: Tensor | None = None,
    wants_weights: bool = False,
) -> Tensor | None:
    """Start the kernel of backward in one of its forms, which writes to ``grad_values``.

    Returns:
        Terms of the gradient of the weights, (N, C, parts, K), if that is wanted.
    """
    n, c, h, w = x.shape
    has_values = values is not None
    maps = tuple(layout_of(y) for y in (x, grad_out, values, grad_values) if y is not None)
    if config is None:
        regime = regime_of(maps, spec, backward=True, has_values=has_values, form=form)
        config = choose_config(
            x,
            regime,
            lambda c: _backward(
                form, grad_out, x, spec, c,
                weights=weights, offsets=offsets, slopes=slopes, shifts=shifts,
                values=values, grad_values=grad_values, wants_weights=wants_weights,
            ),
        )  # fmt: skip
    tile, segments = backward_tile(maps, spec, config)
    constants = _constants(
        maps[0],
        spec,
        tile,
        has_values=has_values,
        shares_weights=weights is not None and weights.dim() == 1,
    )
    parts = None
    if wants_weights and weights is not None:
        parts = weights.new_empty((n, c, segments.tiles * tile.strips.number, len(spec.candidates)))
    source = as_map(x, tile.vector)
    terms = (weights, offsets, slopes, shifts)
    with on_device_of(x):
        meta_pool_bwd_kernel[(tile.programs,)](
            as_map(grad_out, tile.vector),
            source,
            source if values is None else as_map(values, tile.vector),
            *(None if term is None else as_weights(term) for term in terms),
            source if grad_values is None else as_map(grad_values, tile.vector),
            weights if parts is None else parts,
            c,
            h,
            w,
            tile.groups,
            n * c,
            segments.planes,
            segments.tiles,
            tile.strips.number,
            tile.strips.rows,
            **constants,
            FORM=form,
            WANTS_VALUES=grad_values is not None,
            WANTS_WEIGHTS=wants_weights,
            SEGMENTS=config.num_warps,
            TILED=segments.tiles > 1,
            ROUNDS=segments.rounds,
            RERUNS=True,
            num_warps=warps_for(config, x.device),
        )
    return parts


def _total(parts: Tensor, weights: Tensor) -> Tensor:
    """The terms (N, C, parts, K) summed to the shape of the weights, in a fixed order."""
    if weights.dim() == 1:
        return parts.sum((0, 1, 2))
    if weights.dim() == 2:
        return parts.sum((0, 2))
    total = parts.sum(2)
    return total if weights.shape[1] == parts.shape[1] else total.sum(1, keepdim=True)
