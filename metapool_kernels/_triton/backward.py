"""Backward: the gradients of the map and of the weights, in one pass.

A program streams lanes down a strip of rows. When input row t has come, the windows around row
t - R are complete (R: the largest radius): their gradients go to the rows that hold their maxima,
and after R rows more nothing can come to row t - 2R, whose gradients then go to their columns.
A window's maximum is found as forward finds it, first along rows, then down columns, so that its
row is the first whose maximum equals it, and its column is what has been kept for that row.

That is not so where there are NaN, of which the last counts, or windows of nothing but -Inf, which
rows beyond the map equal too; nor with weights that are not finite. A program that has met any of
them runs again, carefully.

Lanes come in segments of 32, a warp each or half a wave of 64. They hold whole planes, or
overlapping tiles of one plane where it is too wide; what goes to columns of other lanes is handed
over inside the segment.
"""

import triton
import triton.language as tl

from metapool_kernels._triton.lanes import (
    first_of,
    inside_row,
    store_row,
)
from metapool_kernels._triton.rows import moved_on, rows_on_map, take_row
from metapool_kernels._triton.segments import LANES, gradients_of_row, store_total
from metapool_kernels._triton.sent import load_terms, shares_of
from metapool_kernels._triton.windows import repeated, rings_of


@triton.jit
def _stream(
    grad_out, x, values, grad_values,
    grad_out_plane, step, x_plane, values_plane, grad_values_plane,
    row_begin, row_end, h, w, group, in_segment, inside, is_owned, shares_avg, shares_max,
    grad_weights, first, index, per_plane,
    AVG: tl.constexpr, MAX: tl.constexpr, NONE: tl.constexpr, FORM: tl.constexpr,
    RADIUS_H: tl.constexpr, RADIUS_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, MERGED: tl.constexpr,
    HAS_VALUES: tl.constexpr, WANTS_VALUES: tl.constexpr, WANTS_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, TILED: tl.constexpr,
    ONE_STRIP: tl.constexpr, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, ROUNDS: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Streams the lanes down the strip and writes both gradients.

    Returns:
        The lower of 0 and the lowest maximum of each lane, or NaN where there is any.
    """
    LENGTH: tl.constexpr = 2 * RADIUS_H + 1
    nothing = tl.full(group.shape, -0.0, ACC)
    minus_infinity = tl.full(group.shape, float("-inf"), ACC)
    WAITING: tl.constexpr = () if FORM == "mix" else AVG
    # Of which the averages are taken: of sums along rows, or of pixels.
    SUMS: tl.constexpr = len(AVG) if FORM == "fields" else min(len(AVG), WANTS_WEIGHTS)
    kept = (
        rings_of(nothing, SUMS, LENGTH),
        rings_of(minus_infinity, len(MAX), LENGTH),
        repeated(tl.zeros(group.shape, tl.int32), LENGTH if WANTS_VALUES and len(MAX) > 0 else 0),
        rings_of(nothing, len(MAX) if HAS_VALUES and WANTS_WEIGHTS else 0, LENGTH),
    )
    due = (
        rings_of(nothing, len(MAX) if WANTS_VALUES else 0, LENGTH),
        rings_of(nothing, 1 if FORM == "mix" else len(AVG), LENGTH),
    )
    kepts = ()
    dues = ()
    for _ in tl.static_range(COLUMNS):
        kepts = kepts + (kept,)
        dues = dues + (due,)
    zero = tl.zeros(group.shape, ACC)
    totals = (
        repeated(zero, len(AVG) if WANTS_WEIGHTS else 0),
        repeated(zero, len(MAX) if WANTS_WEIGHTS else 0),
        repeated(zero, len(NONE) if WANTS_WEIGHTS else 0),
        zero,
    )
    # So many rows before a strip complete no window that reaches it, and so many more do. Where
    # the strip begins with the map, no row is above it.
    ABOVE: tl.constexpr = RADIUS_H if ONE_STRIP else 2 * RADIUS_H
    for i in tl.static_range(2 if UNROLL > 0 and HEIGHT == 0 else 0):
        for row in range(row_begin - (2 - i) * ABOVE, row_begin - (1 - i) * ABOVE):
            kepts, dues, totals = take_row(
                kepts, dues, totals, grad_out, x, values,
                grad_out_plane, step, x_plane, values_plane, row + 2 * RADIUS_H,
                row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
                AVG, MAX, NONE, FORM, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, i == 1, True, ONE_STRIP, True,
                CAREFUL, VECTOR, ACC,
            )  # fmt: skip
            dues = moved_on(dues, nothing)
    for i in tl.static_range(2 * ABOVE if HEIGHT > 0 else 0):
        kepts, dues, totals = take_row(
            kepts, dues, totals, grad_out, x, values,
            grad_out_plane, step, x_plane, values_plane, i,
            row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
            AVG, MAX, NONE, FORM, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
            HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, i >= ABOVE, True, ONE_STRIP, True,
            CAREFUL, VECTOR, ACC,
        )  # fmt: skip
        dues = moved_on(dues, nothing)
    checked_begin = row_begin - 2 * ABOVE if UNROLL == 0 else row_begin
    if UNROLL > 0 and HEIGHT == 0:
        # Up to here all input rows are on the map.
        rows = tl.maximum(tl.minimum(row_end, h - 2 * RADIUS_H) - row_begin, 0)
        checked_begin += rows // UNROLL * UNROLL
        for base in range(row_begin, checked_begin, UNROLL):
            for u in tl.static_range(UNROLL):
                kepts, dues, totals = take_row(
                    kepts, dues, totals, grad_out, x, values,
                    grad_out_plane, step, x_plane, values_plane, base + u + 2 * RADIUS_H,
                    row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
                    AVG, MAX, NONE, FORM, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                    HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, True, False, ONE_STRIP, False,
                    CAREFUL, VECTOR, ACC,
                )  # fmt: skip
                if WANTS_VALUES:
                    columns = gradients_of_row(
                        dues, kepts, in_segment, group, w, nothing, WAITING, MAX, TILED
                    )
                    store_row(
                        grad_values,
                        grad_values_plane,
                        base + u,
                        group,
                        columns,
                        w,
                        is_owned,
                        VECTOR,
                    )
                dues = moved_on(dues, nothing)
    for base in range(checked_begin, 1 if HEIGHT > 0 else row_end):
        for u in tl.static_range(HEIGHT if HEIGHT > 0 else 1):
            row = u if HEIGHT > 0 else base
            kepts, dues, totals = take_row(
                kepts, dues, totals, grad_out, x, values,
                grad_out_plane, step, x_plane, values_plane, row + 2 * RADIUS_H,
                row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
                AVG, MAX, NONE, FORM, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, True, UNROLL == 0, ONE_STRIP, True,
                CAREFUL, VECTOR, ACC,
            )  # fmt: skip
            if WANTS_VALUES:
                columns = gradients_of_row(
                    dues, kepts, in_segment, group, w, nothing, WAITING, MAX, TILED
                )
                mask = is_owned
                if UNROLL == 0:
                    mask &= rows_on_map(row - row_begin, row_end, group)
                store_row(grad_values, grad_values_plane, row, group, columns, w, mask, VECTOR)
            dues = moved_on(dues, nothing)
    avg_totals, max_totals, none_totals, lowest = totals
    if WANTS_WEIGHTS:
        for p in tl.static_range(len(AVG)):
            total = tl.where(is_owned, avg_totals[p], 0.0)
            if MERGED:
                total /= (2 * AVG[p][0] + 1) * (2 * AVG[p][1] + 1)
            at = grad_weights + AVG[p][2]
            store_total(total, at, first, index, per_plane, ROUNDS)
        for p in tl.static_range(len(MAX)):
            total = tl.where(is_owned, max_totals[p], 0.0)
            at = grad_weights + MAX[p][2]
            store_total(total, at, first, index, per_plane, ROUNDS)
        for k in tl.static_range(len(NONE)):
            total = tl.where(is_owned, none_totals[k], 0.0)
            at = grad_weights + NONE[k]
            store_total(total, at, first, index, per_plane, ROUNDS)
    return lowest


@triton.jit(
    do_not_specialize=[
        "channels", "h", "w", "groups", "planes", "planes_per_segment", "tiles", "strips",
        "strip_rows",
    ],
)  # fmt: skip
def meta_pool_bwd_kernel(
    grad_out,
    x,
    values,
    weights,
    offsets,
    slopes,
    shifts,
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
    FORM: tl.constexpr,
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
    VECTOR: tl.constexpr,
    TILED: tl.constexpr,
    ONE_STRIP: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROUNDS: tl.constexpr,
    UNROLL: tl.constexpr,
    RERUNS: tl.constexpr,
):
    """Gradients of ``<grad_out, sum_k weights_k * P_k(values)>``, the maxima picked by ``x``.

    FORM says what takes the place of ``weights_k * grad_out``, see :mod:`.sent`; no other than a
    mixture has gradients of weights. ``grad_weights`` (planes, strips * tiles, COUNT) gets its
    terms of each plane, strip and tile. The other arguments are those of forward.
    """
    pid = tl.program_id(0)
    strip = pid % strips
    tile = pid // strips % tiles
    row_begin = 0 if ONE_STRIP else strip * strip_rows
    h = HEIGHT if HEIGHT > 0 else h
    row_end = tl.minimum(row_begin + strip_rows, h)
    lane = tl.arange(0, SEGMENTS * LANES)
    in_segment = lane % LANES
    segment = (pid // strips // tiles).to(planes.dtype) * SEGMENTS + lane // LANES
    HALO: tl.constexpr = (RADIUS_W + COLUMNS - 1) // COLUMNS
    if TILED:
        plane = segment
        index = in_segment
        group = in_segment + tile * (LANES - 2 * HALO)
        per_plane = LANES
        in_lanes = (plane >= 0) & (plane < planes) & (group < groups)
        is_owned = (in_segment >= HALO) | (tile == 0 + tl.zeros_like(lane))
        is_owned &= (in_segment < LANES - HALO) | (tile == tiles - 1 + tl.zeros_like(lane))
        is_owned &= in_lanes
    else:
        plane = segment * planes_per_segment + in_segment // groups
        group = in_segment % groups
        index = group
        per_plane = groups
        in_lanes = (plane >= 0) & (plane < planes) & (in_segment < planes_per_segment * groups)
        is_owned = in_lanes
    image = (plane // channels).to(tl.int64)
    channel = (plane % channels).to(tl.int64)
    x_plane = first_of(x, image, channel)
    values_plane = first_of(values, image, channel)
    grad_out_plane = first_of(grad_out, image, channel)
    grad_values_plane = first_of(grad_values, image, channel)
    inside = inside_row(group, w, in_lanes, COLUMNS, RADIUS_W)
    of_candidates = load_terms(
        weights, offsets, slopes, shifts, image, channel, in_lanes,
        SHARED_WEIGHTS, COUNT, FORM, ACC,
    )  # fmt: skip
    shares_avg = shares_of(of_candidates, AVG, MERGED)
    shares_max = shares_of(of_candidates, MAX, False)
    step = tl.cast(channels, tl.int64) * grad_out.stride_c

    # The gradient of the weights is the sum of such terms of all planes, tiles and strips.
    terms = grad_weights
    if WANTS_WEIGHTS:
        terms += ((plane.to(tl.int64) * tiles + tile) * strips + strip) * COUNT
    first = is_owned & (index == 0) if not TILED else in_segment + tl.zeros_like(lane) == 0
    first &= in_lanes
    lowest = _stream(
        grad_out, x, values, grad_values,
        grad_out_plane, step, x_plane, values_plane, grad_values_plane,
        row_begin, row_end, h, w, group, in_segment, inside, is_owned, shares_avg, shares_max,
        terms, first, index, per_plane,
        AVG, MAX, NONE, FORM, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
        HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, ACC, COLUMNS, VECTOR, TILED,
        ONE_STRIP, HEIGHT, UNROLL, ROUNDS, HAS_VALUES,
    )  # fmt: skip
    if RERUNS and len(MAX) > 0 and WANTS_VALUES and not HAS_VALUES:
        is_special = in_lanes & ((lowest > float("-inf")) == 0)
        for p in tl.static_range(len(MAX) if FORM == "mix" else 0):
            # Times the zeros beyond the map, such a weight would be NaN.
            is_special |= in_lanes & (shares_max[p] * 0 + tl.zeros_like(lowest) != 0)
        if tl.max(is_special.to(tl.int32), 0) > 0:
            _stream(
                grad_out, x, values, grad_values,
                grad_out_plane, step, x_plane, values_plane, grad_values_plane,
                row_begin, row_end, h, w, group, in_segment, inside, is_owned,
                shares_avg, shares_max, terms, first, index, per_plane,
                AVG, MAX, NONE, FORM, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, ACC, COLUMNS, VECTOR, TILED,
                ONE_STRIP, 0, 0, ROUNDS, True,
            )  # fmt: skip
