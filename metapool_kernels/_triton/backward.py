"""Backward: the gradients of the map and of the weights, in one pass.

A program streams lanes down a strip of rows. When input row t has come, the windows around row
t - R are complete (R: the largest radius): their gradients go to the rows that hold their maxima,
and after R rows more nothing can come to row t - 2R, whose gradients then go to their columns.
A window's maximum is found as forward finds it, first along rows, then down columns, so that its
row is known at once and its column is what has been kept for that row.

Lanes come in segments of 32, one warp each, that hold whole planes, or overlapping tiles of one
plane where it is too wide; what goes to columns of other lanes is handed over inside the segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metapool_kernels._triton.forward import add_row, heights_of, share_of_weights
from metapool_kernels._triton.lanes import (
    as_map,
    as_weights,
    first_of,
    inside_row,
    load_row,
    load_weights,
    store_row,
    window_size,
)
from metapool_kernels._triton.plan import SEGMENT, accumulator, backward_tile, pools_of
from metapool_kernels._triton.windows import pushed, repeated, select_around, sum_around
from metapool_kernels.layout import empty_map
from metapool_kernels.ops import PoolSpec

_SEGMENT: tl.constexpr = tl.constexpr(SEGMENT)


@triton.constexpr_function
def _offsets(radius):
    return tuple(range(-radius, radius + 1))


@triton.jit
def _rows_on_map(row, h, like):
    """Whether a row is on the map, for every lane: the interpreter makes integers of scalars."""
    return (row + tl.zeros_like(like) >= 0) & (row + tl.zeros_like(like) < h)


@triton.jit
def _keep_pixels(
    kept, pooled, compared, inside, nothing,
    AVG: tl.constexpr, MAX: tl.constexpr, RADIUS: tl.constexpr, TAKES: tl.constexpr,
):  # fmt: skip
    """Keeps of a row, for one column, its sums, its maxima, their columns and their values."""
    sums, tops, codes, picks = kept
    new_sums = ()
    for p in tl.static_range(len(sums)):
        total = sum_around(pooled, RADIUS, AVG[p][1]) if TAKES else nothing
        new_sums = new_sums + (pushed(sums[p], total),)
    new_tops = ()
    new_codes = ()
    new_picks = ()
    for p in tl.static_range(len(MAX)):
        top = nothing - float("inf")
        code = tl.zeros(nothing.shape, tl.int32)
        pick = nothing
        if TAKES:
            top, offset = select_around(compared, _offsets(RADIUS), inside, RADIUS, MAX[p][1])
            code += offset
            if len(picks) > 0:
                _, pick = select_around(compared, pooled, inside, RADIUS, MAX[p][1])
        new_tops = new_tops + (pushed(tops[p], top),)
        new_codes = new_codes + (pushed(codes[p], code),)
        if len(picks) > 0:
            new_picks = new_picks + (pushed(picks[p], pick),)
    return new_sums, new_tops, new_codes, new_picks


@triton.jit
def _keep_row(
    kepts, x, values, x_plane, values_plane, row, h, group, inside,
    AVG: tl.constexpr, MAX: tl.constexpr, RADIUS: tl.constexpr, HAS_VALUES: tl.constexpr,
    TAKES: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loads an input row and keeps of it what windows need that hold it."""
    COLUMNS: tl.constexpr = len(kepts)
    on_map = _rows_on_map(row, h, group)
    pooled = repeated(tl.zeros(group.shape, ACC), COLUMNS + 2 * RADIUS)
    compared = pooled
    if TAKES:
        pooled = load_row(
            values, values_plane, row, on_map, group, inside, COLUMNS, RADIUS, WHOLE, VECTOR, ACC
        )
        if len(MAX) > 0:
            compared = pooled
            if HAS_VALUES:
                compared = load_row(
                    x, x_plane, row, on_map, group, inside, COLUMNS, RADIUS, WHOLE, VECTOR, ACC
                )
            filled = ()
            for i in tl.static_range(len(compared)):
                filled = filled + (tl.where(inside[i] & on_map, compared[i], float("-inf")),)
            compared = filled
    nothing = tl.full(group.shape, -0.0, ACC)
    new = ()
    for v in tl.static_range(COLUMNS):
        kept = _keep_pixels(
            kepts[v], pooled[v : v + 2 * RADIUS + 1], compared[v : v + 2 * RADIUS + 1],
            inside[v : v + 2 * RADIUS + 1], nothing, AVG, MAX, RADIUS, TAKES,
        )  # fmt: skip
        new = new + (kept,)
    return new


@triton.jit
def _load_grad_row(
    grad_out, plane, row, on_map, group, inside,
    COLUMNS: tl.constexpr, RADIUS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of the windows around a row's pixels; zero where there is no window."""
    if STRIDE_H > 1:
        on_map = on_map & (row % STRIDE_H + tl.zeros_like(group) == 0)
    if STRIDE_W == 1:
        grads = load_row(
            grad_out, plane, row // STRIDE_H, on_map, group, inside, COLUMNS, RADIUS, WHOLE,
            VECTOR, ACC,
        )  # fmt: skip
    else:
        grads = ()
        start = grad_out.data + plane + (row // STRIDE_H).to(tl.int64) * grad_out.stride_h
        for i in tl.static_range(2 * RADIUS + COLUMNS):
            column = group * COLUMNS + (i - RADIUS)
            at = start + (column // STRIDE_W).to(tl.int64) * grad_out.stride_w
            mask = inside[i] & on_map & (column % STRIDE_W == 0)
            grads = grads + (tl.load(at, mask=mask, other=0).to(ACC),)
    return grads


@triton.jit
def _spread_row(
    dues, kepts, totals, grad_out, plane, row, row_begin, row_end, h, w, group, inside,
    shares_avg, shares_max,
    AVG: tl.constexpr, MAX: tl.constexpr, NONE: tl.constexpr,
    RADIUS_H: tl.constexpr, RADIUS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, MERGED: tl.constexpr,
    WANTS_VALUES: tl.constexpr, WANTS_WEIGHTS: tl.constexpr,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Spreads the gradients of the windows around a row over the rows that these hold.

    What averages get goes where it belongs, what maxima get waits by pooling for its column.
    """
    COLUMNS: tl.constexpr = len(dues)
    on_map = _rows_on_map(row, h, group)
    grads = _load_grad_row(
        grad_out, plane, row, on_map, group, inside,
        COLUMNS, RADIUS, STRIDE_H, STRIDE_W, WHOLE, VECTOR, ACC,
    )  # fmt: skip
    on_rows = ()
    for i in tl.static_range(2 * RADIUS_H + 1):
        on_rows = on_rows + (_rows_on_map(row + (i - RADIUS_H), h, group),)
    # For each average the gradients on their way to the pixels, weighted and divided.
    scaled = ()
    for p in tl.static_range(len(AVG) if WANTS_VALUES else 0):
        of_pooling = ()
        for i in tl.static_range(len(grads)):
            grad = grads[i]
            if not MERGED:
                column = group * COLUMNS + (i - RADIUS)
                count = window_size(row, h, AVG[p][0]) * window_size(column, w, AVG[p][1])
                grad = tl.where(inside[i] & on_map, grad * (shares_avg[p] / count.to(ACC)), 0.0)
            of_pooling = of_pooling + (grad,)
        scaled = scaled + (of_pooling,)
    new_dues = ()
    avg_totals, max_totals, none_totals = totals
    for v in tl.static_range(COLUMNS):
        sums, tops, _, picks = kepts[v]
        pending, ready = dues[v]
        grad = grads[v + RADIUS]
        is_center = inside[v + RADIUS] & on_map
        if STRIDE_H > 1:
            is_center = is_center & (row % STRIDE_H + tl.zeros_like(group) == 0)
        if STRIDE_W > 1:
            is_center = is_center & ((group * COLUMNS + v) % STRIDE_W == 0)
        is_counted = is_center & _rows_on_map(row - row_begin, row_end - row_begin, group)
        if WANTS_VALUES and len(AVG) > 0:
            merged = ()
            for p in tl.static_range(len(AVG)):
                spread = sum_around(scaled[p][v : v + 2 * RADIUS + 1], RADIUS, AVG[p][1])
                if MERGED:
                    spread *= shares_avg[p]
                if p > 0:
                    spread += merged[p - 1]
                merged = merged + (spread,)
            ready = add_row(ready, merged, heights_of(AVG), RADIUS_H, 1)
        if WANTS_WEIGHTS:
            new_totals = ()
            for p in tl.static_range(len(AVG)):
                pooled = sum_around(sums[p], RADIUS_H, AVG[p][0])
                if MERGED:
                    pooled = tl.where(is_counted, pooled, 0.0)
                else:
                    column = group * COLUMNS + v
                    count = window_size(row, h, AVG[p][0]) * window_size(column, w, AVG[p][1])
                    pooled = tl.where(is_counted, pooled / count.to(ACC), 0.0)
                new_totals = new_totals + (avg_totals[p] + grad * pooled,)
            avg_totals = new_totals
            new_totals = ()
            for k in tl.static_range(len(NONE)):
                new_totals = new_totals + (none_totals[k] + grad * 0.0,)
            none_totals = new_totals
        new_max_totals = ()
        new_pending = ()
        for p in tl.static_range(len(MAX)):
            top, offset = select_around(tops[p], _offsets(RADIUS_H), on_rows, RADIUS_H, MAX[p][0])
            if WANTS_WEIGHTS:
                if len(picks) > 0:
                    _, top = select_around(tops[p], picks[p], on_rows, RADIUS_H, MAX[p][0])
                top = tl.where(is_counted, top, 0.0)
                new_max_totals = new_max_totals + (max_totals[p] + grad * top,)
            if WANTS_VALUES:
                share = tl.where(is_center, grad * shares_max[p], 0.0)
                going = ()
                for i in tl.static_range(2 * RADIUS_H + 1):
                    due = pending[p][i]
                    if i >= RADIUS_H - MAX[p][0] and i <= RADIUS_H + MAX[p][0]:
                        due = tl.where(offset == i - RADIUS_H, due + share, due)
                    going = going + (due,)
                new_pending = new_pending + (going,)
        max_totals = new_max_totals
        new_dues = new_dues + ((new_pending, ready),)
    return new_dues, (avg_totals, max_totals, none_totals)


@triton.jit
def _from_lane(block, DELTA: tl.constexpr):
    """What the lane DELTA further in the segment holds, around its end."""
    SEGMENTS: tl.constexpr = block.shape[0] // _SEGMENT
    lane = (tl.arange(0, _SEGMENT) + (DELTA + _SEGMENT)) % _SEGMENT
    lane = tl.broadcast_to(lane[None, :], (SEGMENTS, _SEGMENT))
    block = tl.gather(tl.reshape(block, (SEGMENTS, _SEGMENT)), lane, 1)
    return tl.reshape(block, (SEGMENTS * _SEGMENT,))


@triton.jit
def _finish_row(
    dues, kepts, in_segment, MAX: tl.constexpr, RADIUS: tl.constexpr,
    WHOLE: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """The gradients of the oldest row."""
    COLUMNS: tl.constexpr = len(dues)
    HANDED: tl.constexpr = 0 if WHOLE else RADIUS if len(MAX) > 0 else 0
    nothing = tl.full(in_segment.shape, -0.0, dues[0][1][0].dtype)
    # What the maxima of this row give to each of the lane's columns and to its neighbours'.
    given = ()
    for i in tl.static_range(COLUMNS + 2 * HANDED):
        total = nothing
        for v in tl.static_range(COLUMNS):
            _, _, codes, _ = kepts[v]
            pending, _ = dues[v]
            for p in tl.static_range(len(MAX)):
                if i - HANDED - v >= -MAX[p][1] and i - HANDED - v <= MAX[p][1]:
                    total += tl.where(codes[p][0] == i - HANDED - v, pending[p][0], 0.0)
        given = given + (total,)
    row = ()
    for v in tl.static_range(COLUMNS):
        _, ready = dues[v]
        grad = ready[0] + given[v + HANDED]
        for lanes in tl.static_range(1, (HANDED + COLUMNS - 1) // COLUMNS + 1):
            if v + lanes * COLUMNS < COLUMNS + HANDED:
                handed = _from_lane(given[v + lanes * COLUMNS + HANDED], -lanes)
                if TILED:
                    handed = tl.where(in_segment >= lanes, handed, 0.0)
                grad += handed
            if v - lanes * COLUMNS >= -HANDED:
                handed = _from_lane(given[v - lanes * COLUMNS + HANDED], lanes)
                if TILED:
                    handed = tl.where(in_segment < _SEGMENT - lanes, handed, 0.0)
                grad += handed
        row = row + (grad,)
    return row


@triton.jit
def _moved_on(dues, nothing):
    """What is due without the oldest row, and with a new one."""
    moved = ()
    for v in tl.static_range(len(dues)):
        pending, ready = dues[v]
        new_pending = ()
        for p in tl.static_range(len(pending)):
            new_pending = new_pending + (pushed(pending[p], nothing),)
        moved = moved + ((new_pending, pushed(ready, nothing)),)
    return moved


@triton.jit
def _store_total(total, at, first, index, groups, ROUNDS: tl.constexpr):
    """Adds up a total over the lanes of each plane, in a fixed order, and writes it."""
    for i in tl.static_range(ROUNDS):
        handed = _from_lane(total, 2**i)
        total += tl.where(index + 2**i < groups, handed, 0.0)
    tl.store(at, total, mask=first)


@triton.jit
def _meta_pool_bwd_kernel(
    grad_out,
    x,
    values,
    weights,
    grad_values,
    grad_weights,
    channels,
    h,
    w,
    groups,
    planes,
    planes_per_segment,
    tiles,
    strips,
    strip_rows,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    NONE: tl.constexpr,
    COUNT: tl.constexpr,
    RADIUS_H: tl.constexpr,
    RADIUS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    MERGED: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    WANTS_VALUES: tl.constexpr,
    WANTS_WEIGHTS: tl.constexpr,
    SHARED_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    VECTOR: tl.constexpr,
    TILED: tl.constexpr,
    ONE_STRIP: tl.constexpr,
    ROUNDS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Gradients of ``<grad_out, sum_k weights_k * P_k(values)>``, the maxima picked by ``x``.

    ``grad_weights`` (planes, strips * tiles, COUNT) gets its terms of each plane, strip and tile.
    The other arguments are those of forward.
    """
    pid = tl.program_id(0)
    strip = pid % strips
    tile = pid // strips % tiles
    row_begin = 0 if ONE_STRIP else strip * strip_rows
    row_end = tl.minimum(row_begin + strip_rows, h)
    lane = tl.arange(0, SEGMENTS * _SEGMENT)
    in_segment = lane % _SEGMENT
    segment = (pid // strips // tiles).to(planes.dtype) * SEGMENTS + lane // _SEGMENT
    HALO: tl.constexpr = (RADIUS_W + COLUMNS - 1) // COLUMNS
    if TILED:
        plane = segment
        index = in_segment
        group = in_segment + tile * (_SEGMENT - 2 * HALO)
        per_plane = _SEGMENT
        in_lanes = (plane < planes) & (group < groups)
        is_owned = (in_segment >= HALO) | (tile == 0 + tl.zeros_like(lane))
        is_owned &= (in_segment < _SEGMENT - HALO) | (tile == tiles - 1 + tl.zeros_like(lane))
        is_owned &= in_lanes
    else:
        plane = segment * planes_per_segment + in_segment // groups
        group = in_segment % groups
        index = group
        per_plane = groups
        in_lanes = (plane < planes) & (in_segment < planes_per_segment * groups)
        is_owned = in_lanes
    image = (plane // channels).to(tl.int64)
    channel = (plane % channels).to(tl.int64)
    x_plane = first_of(x, image, channel)
    values_plane = first_of(values, image, channel)
    grad_out_plane = first_of(grad_out, image, channel)
    grad_values_plane = first_of(grad_values, image, channel)
    inside = inside_row(group, w, in_lanes, COLUMNS, RADIUS_W, WHOLE)
    weight = load_weights(weights, image, channel, in_lanes, SHARED_WEIGHTS, COUNT)
    shares_avg, shares_max = share_of_weights(weight, AVG, MAX, MERGED)

    LENGTH: tl.constexpr = 2 * RADIUS_H + 1
    USES_X: tl.constexpr = len(MAX) > 0 or (WANTS_WEIGHTS and len(AVG) > 0)
    nothing = tl.full(lane.shape, -0.0, ACC)
    lowest = tl.full(lane.shape, float("-inf"), ACC)
    kepts = repeated(
        (
            repeated(repeated(nothing, LENGTH), len(AVG) if WANTS_WEIGHTS else 0),
            repeated(repeated(lowest, LENGTH), len(MAX)),
            repeated(repeated(tl.zeros(lane.shape, tl.int32), LENGTH), len(MAX)),
            repeated(repeated(nothing, LENGTH), len(MAX) if HAS_VALUES and WANTS_WEIGHTS else 0),
        ),
        COLUMNS,
    )
    dues = repeated(
        (
            repeated(repeated(nothing, LENGTH), len(MAX) if WANTS_VALUES else 0),
            repeated(nothing, LENGTH),
        ),
        COLUMNS,
    )
    zero = tl.zeros(lane.shape, ACC)
    totals = (
        repeated(zero, len(AVG) if WANTS_WEIGHTS else 0),
        repeated(zero, len(MAX) if WANTS_WEIGHTS else 0),
        repeated(zero, len(NONE) if WANTS_WEIGHTS else 0),
    )
    # Where the strip begins with the map, no row is above it.
    for i in tl.static_range(2 * RADIUS_H if ONE_STRIP else 0, 4 * RADIUS_H):
        kepts = _keep_row(
            kepts, x, values, x_plane, values_plane, row_begin + (i - 2 * RADIUS_H), h,
            group, inside, AVG, MAX, RADIUS_W, HAS_VALUES, USES_X, WHOLE, VECTOR, ACC,
        )  # fmt: skip
        if i >= (3 * RADIUS_H if ONE_STRIP else 2 * RADIUS_H):
            dues, totals = _spread_row(
                dues, kepts, totals, grad_out, grad_out_plane, row_begin + (i - 3 * RADIUS_H),
                row_begin, row_end, h, w, group, inside, shares_avg, shares_max,
                AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                WANTS_VALUES, WANTS_WEIGHTS, WHOLE, VECTOR, ACC,
            )  # fmt: skip
        dues = _moved_on(dues, nothing)
    for base in range(row_begin, row_end, UNROLL):
        for u in tl.static_range(UNROLL):
            row = base + u
            kepts = _keep_row(
                kepts, x, values, x_plane, values_plane, row + 2 * RADIUS_H, h,
                group, inside, AVG, MAX, RADIUS_W, HAS_VALUES, USES_X, WHOLE, VECTOR, ACC,
            )  # fmt: skip
            dues, totals = _spread_row(
                dues, kepts, totals, grad_out, grad_out_plane, row + RADIUS_H,
                row_begin, row_end, h, w, group, inside, shares_avg, shares_max,
                AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                WANTS_VALUES, WANTS_WEIGHTS, WHOLE, VECTOR, ACC,
            )  # fmt: skip
            if WANTS_VALUES:
                columns = _finish_row(dues, kepts, in_segment, MAX, RADIUS_W, WHOLE, TILED)
                mask = is_owned & _rows_on_map(row, row_end, group)
                store_row(
                    grad_values, grad_values_plane, row, group, columns, w, mask, WHOLE, VECTOR
                )
            dues = _moved_on(dues, nothing)
    if WANTS_WEIGHTS:
        avg_totals, max_totals, none_totals = totals
        part = (plane.to(tl.int64) * tiles + tile) * strips + strip
        first = is_owned & (index == 0) if not TILED else in_segment + tl.zeros_like(lane) == 0
        first = first & in_lanes
        for p in tl.static_range(len(AVG)):
            total = tl.where(is_owned, avg_totals[p], 0.0)
            if MERGED:
                total /= (2 * AVG[p][0] + 1) * (2 * AVG[p][1] + 1)
            for k in tl.static_range(len(AVG[p][2])):
                at = grad_weights + part * COUNT + AVG[p][2][k]
                _store_total(total, at, first, index, per_plane, ROUNDS)
        for p in tl.static_range(len(MAX)):
            total = tl.where(is_owned, max_totals[p], 0.0)
            for k in tl.static_range(len(MAX[p][2])):
                at = grad_weights + part * COUNT + MAX[p][2][k]
                _store_total(total, at, first, index, per_plane, ROUNDS)
        for k in tl.static_range(len(NONE)):
            total = tl.where(is_owned, none_totals[k], 0.0)
            at = grad_weights + part * COUNT + NONE[k]
            _store_total(total, at, first, index, per_plane, ROUNDS)


def meta_pool_bwd(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    values: Tensor | None,
    spec: PoolSpec,
    output_mask: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """:func:`metapool_kernels.ops.meta_pool_bwd` on the device of ``x``."""
    n, c, h, w = x.shape
    wants_values, wants_weights = output_mask
    grad_values = empty_map(x, x.shape, spec.channels_last) if wants_values else x.new_empty(0)
    if n == 0 or not any(output_mask):
        grad_weights = torch.zeros_like(weights) if wants_weights else weights.new_empty(0)
        return grad_values, grad_weights
    pools = pools_of(spec.candidates)
    maps = (x, grad_out) if values is None else (x, values, grad_out)
    tile = backward_tile(maps + ((grad_values,) if wants_values else ()), spec, pools)
    vector = tile.columns if tile.vector and tile.groups > 1 else 1
    parts = weights.new_empty((n, c, tile.tiles * tile.strips, len(spec.candidates)))
    source = as_map(x, vector)
    _meta_pool_bwd_kernel[(tile.programs,)](
        as_map(grad_out, vector),
        source,
        source if values is None else as_map(values, vector),
        as_weights(weights),
        as_map(grad_values, vector) if wants_values else source,
        parts,
        c,
        h,
        w,
        tile.groups,
        n * c,
        tile.planes_per_segment,
        tile.tiles,
        tile.strips,
        tile.strip_rows,
        AVG=pools.avg,
        MAX=pools.max,
        NONE=pools.none,
        COUNT=len(spec.candidates),
        RADIUS_H=pools.radius_h,
        RADIUS_W=pools.radius_w,
        STRIDE_H=min(spec.stride[0], h),
        STRIDE_W=min(spec.stride[1], w),
        MERGED=spec.count_include_pad,
        HAS_VALUES=values is not None and bool(pools.max),
        WANTS_VALUES=wants_values,
        WANTS_WEIGHTS=wants_weights,
        SHARED_WEIGHTS=weights.dim() == 1,
        ACC=accumulator(x.dtype),
        SEGMENTS=tile.num_warps,
        COLUMNS=tile.columns,
        WHOLE=tile.groups == 1,
        VECTOR=tile.vector,
        TILED=tile.tiles > 1,
        ONE_STRIP=tile.strips == 1,
        ROUNDS=tile.rounds,
        UNROLL=tile.unroll,
        num_warps=tile.num_warps,
    )
    return grad_values, _total(parts, weights) if wants_weights else weights.new_empty(0)


def _total(parts: Tensor, weights: Tensor) -> Tensor:
    """The terms (N, C, parts, K) summed to the shape of the weights, in a fixed order."""
    if weights.dim() == 1:
        return parts.sum((0, 1, 2))
    if weights.dim() == 2:
        return parts.sum((0, 2))
    total = parts.sum(2)
    return total if weights.shape[1] == parts.shape[1] else total.sum(1, keepdim=True)
