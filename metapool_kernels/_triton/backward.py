"""Backward: the gradients of the map and of the weights, in one pass.

A program streams lanes down a strip of rows. When input row t has come, the windows around row
t - R are complete (R: the largest radius): their gradients go to the rows that hold their maxima,
and after R rows more nothing can come to row t - 2R, whose gradients then go to their columns.
A window's maximum is found as forward finds it, first along rows, then down columns, so that its
row is known at once and its column is what has been kept for that row.

Lanes come in segments of 32, one warp each, that hold whole planes, or overlapping tiles of one
plane where it is too wide; what goes to columns of other lanes is handed over inside the segment.
"""

import triton
import triton.language as tl

from metapool_kernels._triton.forward import add_row, heights_of, weights_of
from metapool_kernels._triton.lanes import (
    first_of,
    inside_row,
    load_row,
    load_rows,
    load_weights,
    store_row,
    window_size,
)
from metapool_kernels._triton.segments import LANES, gradients_of_row, store_total
from metapool_kernels._triton.windows import (
    added_around,
    chosen_around,
    divided,
    picked_around,
    pushed,
    repeated,
    rings_of,
    sum_around,
)


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
            top, keeps, moves = chosen_around(compared, inside, RADIUS, MAX[p][1])
            code += picked_around(_offsets(RADIUS), keeps, moves, RADIUS)
            if len(picks) > 0:
                pick = picked_around(pooled, keeps, moves, RADIUS)
        new_tops = new_tops + (pushed(tops[p], top),)
        new_codes = new_codes + (pushed(codes[p], code),)
        if len(picks) > 0:
            new_picks = new_picks + (pushed(picks[p], pick),)
    return new_sums, new_tops, new_codes, new_picks


@triton.jit
def _keep_row(
    kepts, x, values, x_plane, values_plane, row, group, inside,
    AVG: tl.constexpr, MAX: tl.constexpr, RADIUS: tl.constexpr, HAS_VALUES: tl.constexpr,
    TAKES: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loads an input row, if TAKES, and keeps of it what windows need that hold it."""
    COLUMNS: tl.constexpr = len(kepts)
    nothing = tl.full(group.shape, -0.0, ACC)
    pooled = repeated(nothing, COLUMNS + 2 * RADIUS)
    compared = pooled
    if TAKES:
        pooled, compared = load_rows(
            x, values, x_plane, values_plane, row, group, inside,
            COLUMNS, RADIUS, len(MAX) > 0, HAS_VALUES, VECTOR, ACC,
        )  # fmt: skip
    new = ()
    for v in tl.static_range(COLUMNS):
        kept = _keep_pixels(
            kepts[v], pooled[v : v + 2 * RADIUS + 1], compared[v : v + 2 * RADIUS + 1],
            inside[v : v + 2 * RADIUS + 1], nothing, AVG, MAX, RADIUS, TAKES,
        )  # fmt: skip
        new = new + (kept,)
    return new


@triton.jit
def _keep_row_or_none(
    kepts, x, values, x_plane, values_plane, row, on_map, group, inside,
    AVG: tl.constexpr, MAX: tl.constexpr, RADIUS: tl.constexpr, HAS_VALUES: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The same for any row: one that is not ``on_map`` has nothing to load."""
    if on_map:
        kepts = _keep_row(
            kepts, x, values, x_plane, values_plane, row, group, inside,
            AVG, MAX, RADIUS, HAS_VALUES, True, VECTOR, ACC,
        )  # fmt: skip
    else:
        kepts = _keep_row(
            kepts, x, values, x_plane, values_plane, row, group, inside,
            AVG, MAX, RADIUS, HAS_VALUES, False, VECTOR, ACC,
        )  # fmt: skip
    return kepts


@triton.jit
def _load_grad_row(
    grad_out, plane, row, group, inside,
    COLUMNS: tl.constexpr, RADIUS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of the windows around a row's pixels; zero where there is no window."""
    has_windows = row % STRIDE_H + tl.zeros_like(group) == 0
    if STRIDE_W == 1:
        if STRIDE_H > 1:
            of_windows = ()
            for i in tl.static_range(len(inside)):
                of_windows = of_windows + (inside[i] & has_windows,)
            inside = of_windows
        grads = load_row(
            grad_out, plane, row // STRIDE_H, group, inside, COLUMNS, RADIUS, VECTOR, ACC
        )
    else:
        grads = ()
        start = grad_out.data + plane + (row // STRIDE_H).to(tl.int64) * grad_out.stride_h
        for i in tl.static_range(2 * RADIUS + COLUMNS):
            column = group * COLUMNS + (i - RADIUS)
            at = start + (column // STRIDE_W).to(tl.int64) * grad_out.stride_w
            mask = inside[i] & has_windows & (column % STRIDE_W == 0)
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
    AT_TOP: tl.constexpr, ONE_STRIP: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Spreads the gradients of the windows around a row over the rows that these hold.

    What averages get goes where it belongs, what maxima get waits by pooling for its column.
    """
    COLUMNS: tl.constexpr = len(dues)
    grads = _load_grad_row(
        grad_out, plane, row, group, inside,
        COLUMNS, RADIUS, STRIDE_H, STRIDE_W, VECTOR, ACC,
    )  # fmt: skip
    rows_above = ()
    for i in tl.static_range(RADIUS_H if AT_TOP else 0):
        rows_above = rows_above + (row + (i - RADIUS_H) + tl.zeros_like(group) >= 0,)
    # For each average the gradients on their way to the pixels, weighted and divided.
    scaled = ()
    for p in tl.static_range(len(AVG) if WANTS_VALUES else 0):
        of_pooling = ()
        for i in tl.static_range(len(grads)):
            grad = grads[i]
            if not MERGED:
                column = group * COLUMNS + (i - RADIUS)
                count = window_size(row, h, AVG[p][0]) * window_size(column, w, AVG[p][1])
                grad = tl.where(
                    inside[i],
                    grad * divided(shares_avg[p] + tl.zeros_like(grad), count.to(ACC)),
                    0.0,
                )
            of_pooling = of_pooling + (grad,)
        scaled = scaled + (of_pooling,)
    new_dues = ()
    avg_totals, max_totals, none_totals = totals
    for v in tl.static_range(COLUMNS):
        sums, tops, _, picks = kepts[v]
        pending, ready = dues[v]
        grad = grads[v + RADIUS]
        column = group * COLUMNS + v
        is_center = inside[v + RADIUS]
        if STRIDE_H > 1 or STRIDE_W > 1:
            is_center &= (row % STRIDE_H + tl.zeros_like(group) == 0) & (column % STRIDE_W == 0)
        is_counted = is_center
        if not ONE_STRIP:
            is_counted &= _rows_on_map(row - row_begin, row_end - row_begin, group)
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
                if not MERGED:
                    count = window_size(row, h, AVG[p][0]) * window_size(column, w, AVG[p][1])
                    pooled = divided(pooled, count.to(ACC))
                if not (ONE_STRIP and STRIDE_H * STRIDE_W == 1):
                    pooled = tl.where(is_counted, pooled, 0.0)
                new_totals = new_totals + (avg_totals[p] + grad * pooled,)
            avg_totals = new_totals
            new_totals = ()
            for k in tl.static_range(len(NONE)):
                new_totals = new_totals + (none_totals[k] + grad * 0.0,)
            none_totals = new_totals
        new_max_totals = ()
        new_pending = ()
        for p in tl.static_range(len(MAX)):
            top, keeps, moves = chosen_around(tops[p], rows_above, RADIUS_H, MAX[p][0])
            if WANTS_WEIGHTS:
                if len(picks) > 0:
                    top = picked_around(picks[p], keeps, moves, RADIUS_H)
                if not (ONE_STRIP and STRIDE_H * STRIDE_W == 1):
                    top = tl.where(is_counted, top, 0.0)
                new_max_totals = new_max_totals + (max_totals[p] + grad * top,)
            if WANTS_VALUES:
                share = grad * shares_max[p]
                if STRIDE_H * STRIDE_W > 1:
                    share = tl.where(is_center, share, 0.0)
                going = added_around(pending[p], share, keeps, moves, RADIUS_H)
                new_pending = new_pending + (going,)
        max_totals = new_max_totals
        new_dues = new_dues + ((new_pending, ready),)
    return new_dues, (avg_totals, max_totals, none_totals)


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
    VECTOR: tl.constexpr,
    TILED: tl.constexpr,
    ONE_STRIP: tl.constexpr,
    HEIGHT: tl.constexpr,
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
    weight = load_weights(weights, image, channel, in_lanes, SHARED_WEIGHTS, COUNT)
    shares_avg = weights_of(weight, AVG, MERGED)
    shares_max = weights_of(weight, MAX, False)

    LENGTH: tl.constexpr = 2 * RADIUS_H + 1
    USES_X: tl.constexpr = len(MAX) > 0 or (WANTS_WEIGHTS and len(AVG) > 0)
    nothing = tl.full(lane.shape, -0.0, ACC)
    lowest = tl.full(lane.shape, float("-inf"), ACC)
    kept = (
        rings_of(nothing, len(AVG) if WANTS_WEIGHTS else 0, LENGTH),
        rings_of(lowest, len(MAX), LENGTH),
        rings_of(tl.zeros(lane.shape, tl.int32), len(MAX), LENGTH),
        rings_of(nothing, len(MAX) if HAS_VALUES and WANTS_WEIGHTS else 0, LENGTH),
    )
    due = (
        rings_of(nothing, len(MAX) if WANTS_VALUES else 0, LENGTH),
        repeated(nothing, LENGTH),
    )
    kepts = ()
    dues = ()
    for _ in tl.static_range(COLUMNS):
        kepts = kepts + (kept,)
        dues = dues + (due,)
    zero = tl.zeros(lane.shape, ACC)
    totals = (
        repeated(zero, len(AVG) if WANTS_WEIGHTS else 0),
        repeated(zero, len(MAX) if WANTS_WEIGHTS else 0),
        repeated(zero, len(NONE) if WANTS_WEIGHTS else 0),
    )
    # Where the strip begins with the map, no row is above it.
    for i in tl.static_range(2 * RADIUS_H if ONE_STRIP else 0, 4 * RADIUS_H):
        row = row_begin + (i - 2 * RADIUS_H)
        if USES_X:
            kepts = _keep_row_or_none(
                kepts, x, values, x_plane, values_plane, row, (row >= 0) & (row < h), group, inside,
                AVG, MAX, RADIUS_W, HAS_VALUES, VECTOR, ACC,
            )  # fmt: skip
        if i >= (3 * RADIUS_H if ONE_STRIP else 2 * RADIUS_H):  # noqa: SIM102 (one is static)
            if (row - RADIUS_H >= 0) & (row - RADIUS_H < h):
                dues, totals = _spread_row(
                    dues, kepts, totals, grad_out, grad_out_plane, row - RADIUS_H,
                    row_begin, row_end, h, w, group, inside, shares_avg, shares_max,
                    AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                    WANTS_VALUES, WANTS_WEIGHTS, True, ONE_STRIP, VECTOR, ACC,
                )  # fmt: skip
        dues = _moved_on(dues, nothing)
    for base in range(row_begin, 1 if HEIGHT > 0 else row_end, UNROLL):
        for u in tl.static_range(UNROLL):
            row = u if HEIGHT > 0 else base + u
            if USES_X:
                kepts = _keep_row_or_none(
                    kepts, x, values, x_plane, values_plane,
                    row + 2 * RADIUS_H, row + 2 * RADIUS_H < h, group, inside,
                    AVG, MAX, RADIUS_W, HAS_VALUES, VECTOR, ACC,
                )  # fmt: skip
            if row + RADIUS_H < h:
                dues, totals = _spread_row(
                    dues, kepts, totals, grad_out, grad_out_plane, row + RADIUS_H,
                    row_begin, row_end, h, w, group, inside, shares_avg, shares_max,
                    AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                    WANTS_VALUES, WANTS_WEIGHTS, False, ONE_STRIP, VECTOR, ACC,
                )  # fmt: skip
            if WANTS_VALUES:
                columns = gradients_of_row(dues, kepts, in_segment, MAX, RADIUS_W, TILED)
                mask = is_owned & _rows_on_map(row, row_end, group)
                store_row(grad_values, grad_values_plane, row, group, columns, w, mask, VECTOR)
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
            at = grad_weights + part * COUNT + AVG[p][2]
            store_total(total, at, first, index, per_plane, ROUNDS)
        for p in tl.static_range(len(MAX)):
            total = tl.where(is_owned, max_totals[p], 0.0)
            at = grad_weights + part * COUNT + MAX[p][2]
            store_total(total, at, first, index, per_plane, ROUNDS)
        for k in tl.static_range(len(NONE)):
            total = tl.where(is_owned, none_totals[k], 0.0)
            at = grad_weights + part * COUNT + NONE[k]
            store_total(total, at, first, index, per_plane, ROUNDS)
