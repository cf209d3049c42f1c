"""Backward: the gradients of the map and of the weights, in one pass.

A program streams lanes down a strip of rows. When input row t has come, the windows around row
t - R are complete (R: the largest radius): their gradients go to the rows that hold their maxima,
and after R rows more nothing can come to row t - 2R, whose gradients then go to their columns.
A window's maximum is found as forward finds it, first along rows, then down columns, so that its
row is known at once and its column is what has been kept for that row.

Lanes come in segments of 32, one warp each, that hold whole planes, or overlapping tiles of one
plane where it is too wide; what goes to columns of other lanes is handed over inside the segment.
"""

import itertools

import triton
import triton.language as tl

from metapool_kernels._triton.forward import add_row, heights_of, weights_of
from metapool_kernels._triton.lanes import (
    first_of,
    inside_row,
    load_row,
    load_weights,
    store_row,
    window_size,
)
from metapool_kernels._triton.segments import LANES, gradients_of_row, store_total, widest
from metapool_kernels._triton.windows import (
    added_around,
    added_to_first,
    chosen_around,
    divided,
    largest_around,
    lower,
    packed,
    picked_around,
    pushed,
    repeated,
    rings_of,
    sum_around,
)


@triton.jit
def _rows_on_map(row, h, like):
    """Whether a row is on the map, for every lane: the interpreter makes integers of scalars."""
    return (row + tl.zeros_like(like) >= 0) & (row + tl.zeros_like(like) < h)


@triton.jit
def _keep_pixels(
    kept, center, pooled, compared, inside,
    MAX: tl.constexpr, RADIUS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Keeps of a row, for one column, its pixel, its maxima, where they stand and their values."""
    centers, tops, codes, picks = kept
    if len(centers) > 0:
        centers = pushed(centers, center)
    new_tops = ()
    new_picks = ()
    for p in tl.static_range(len(MAX)):
        top, keeps, moves = chosen_around(compared, inside, RADIUS, MAX[p][1], CAREFUL)
        new_tops = new_tops + (pushed(tops[p], top),)
        if len(picks) > 0:
            pick = picked_around(pooled, keeps, moves, RADIUS)
            new_picks = new_picks + (pushed(picks[p], pick),)
    if len(codes) > 0:
        _, keeps, moves = chosen_around(compared, inside, RADIUS, widest(MAX), CAREFUL)
        codes = pushed(codes, packed(keeps, moves))
    return centers, new_tops, codes, new_picks


@triton.jit
def _keep_row(
    kepts, x, values, x_plane, values_plane, row, group, inside,
    MAX: tl.constexpr, RADIUS: tl.constexpr, HAS_VALUES: tl.constexpr, CAREFUL: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loads an input row and keeps of it what windows need that hold it."""
    COLUMNS: tl.constexpr = len(kepts)
    centers, _, _, picks = kepts[0]
    compared = ()
    pooled = ()
    if len(MAX) > 0:
        compared = load_row(
            x, x_plane, row, group, inside, COLUMNS, RADIUS, VECTOR, ACC, float("-inf")
        )
    if len(picks) > 0:
        pooled = load_row(values, values_plane, row, group, inside, COLUMNS, RADIUS, VECTOR, ACC)
    inside_lane = inside[RADIUS : RADIUS + COLUMNS]
    if len(centers) > 0 and (len(MAX) == 0 or HAS_VALUES):
        lane = load_row(values, values_plane, row, group, inside_lane, COLUMNS, 0, VECTOR, ACC)
    new = ()
    for v in tl.static_range(COLUMNS):
        if len(centers) == 0:
            center = 0.0
        elif len(MAX) == 0 or HAS_VALUES:
            center = lane[v]
        else:
            center = tl.where(inside_lane[v], compared[RADIUS + v], 0.0)
        kept = _keep_pixels(
            kepts[v], center, pooled[v : v + 2 * RADIUS + 1], compared[v : v + 2 * RADIUS + 1],
            inside[v : v + 2 * RADIUS + 1], MAX, RADIUS, CAREFUL,
        )  # fmt: skip
        new = new + (kept,)
    return new


@triton.jit
def _keep_nothing(kepts, nothing):
    """The same of a row that is not on the map."""
    new = ()
    for v in tl.static_range(len(kepts)):
        centers, tops, codes, picks = kepts[v]
        new_tops = ()
        new_picks = ()
        for p in tl.static_range(len(tops)):
            new_tops = new_tops + (pushed(tops[p], nothing - float("inf")),)
            if len(picks) > 0:
                new_picks = new_picks + (pushed(picks[p], nothing),)
        if len(centers) > 0:
            centers = pushed(centers, nothing)
        if len(codes) > 0:
            codes = pushed(codes, tl.zeros(nothing.shape, tl.int32))
        new = new + ((centers, new_tops, codes, new_picks),)
    return new


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
        start = grad_out.data + plane + tl.cast(row // STRIDE_H, tl.int64) * grad_out.stride_h
        for i in tl.static_range(2 * RADIUS + COLUMNS):
            column = group * COLUMNS + (i - RADIUS)
            at = start + (column // STRIDE_W).to(tl.int64) * grad_out.stride_w
            mask = inside[i] & has_windows & (column % STRIDE_W == 0)
            grads = grads + (tl.load(at, mask=mask, other=0).to(ACC),)
    return grads


@triton.jit
def _holds_windows(
    row, column, inside, CENTER: tl.constexpr, RADIUS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
):  # fmt: skip
    """Whether there are windows whose centers are in this row, up to RADIUS from a column."""
    holds = (column + CENTER) % STRIDE_W < 0
    for d in tl.static_range(-RADIUS, RADIUS + 1):
        holds |= ((column + d) % STRIDE_W == 0) & inside[CENTER + d]
    return holds & (row % STRIDE_H + tl.zeros_like(column) == 0)


@triton.jit
def _spread_row(
    dues, kepts, totals, grad_out, plane, row, row_begin, row_end, h, w, group, inside,
    shares_avg, shares_max,
    AVG: tl.constexpr, MAX: tl.constexpr, NONE: tl.constexpr,
    RADIUS_H: tl.constexpr, RADIUS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, MERGED: tl.constexpr,
    WANTS_VALUES: tl.constexpr, WANTS_WEIGHTS: tl.constexpr,
    AT_TOP: tl.constexpr, ONE_STRIP: tl.constexpr,
    CAREFUL: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Spreads the gradients of the windows around a row over the rows that these hold.

    What averages get goes where it belongs, what maxima get waits by pooling for its column.
    """
    COLUMNS: tl.constexpr = len(dues)
    ALL_INSIDE: tl.constexpr = VECTOR or COLUMNS == 1  # those of a lane are on the map, or none is
    grads = _load_grad_row(
        grad_out, plane, row, group, inside,
        COLUMNS, RADIUS, STRIDE_H, STRIDE_W, VECTOR, ACC,
    )  # fmt: skip
    rows_above = ()
    for i in tl.static_range(RADIUS_H if AT_TOP else 0):
        rows_above = rows_above + (row + (i - RADIUS_H) + tl.zeros_like(group) >= 0,)
    # For each average the gradients of its windows, divided.
    divided_by_area = ()
    for p in tl.static_range(len(AVG)):
        of_pooling = ()
        for i in tl.static_range(len(grads)):
            grad = grads[i]
            if not MERGED:
                column = group * COLUMNS + (i - RADIUS)
                count = window_size(row, h, AVG[p][0]) * window_size(column, w, AVG[p][1])
                grad = tl.where(inside[i], divided(grad, count.to(ACC)), 0.0)
            of_pooling = of_pooling + (grad,)
        divided_by_area = divided_by_area + (of_pooling,)
    if not ONE_STRIP:
        is_row_counted = _rows_on_map(row - row_begin, row_end - row_begin, group)
    new_dues = ()
    avg_totals, max_totals, none_totals, lowest = totals
    for v in tl.static_range(COLUMNS):
        centers, tops, _, picks = kepts[v]
        pending, ready = dues[v]
        grad = grads[v + RADIUS]
        column = group * COLUMNS + v
        is_center = inside[v + RADIUS]
        if STRIDE_H > 1 or STRIDE_W > 1:
            is_center &= (row % STRIDE_H + tl.zeros_like(group) == 0) & (column % STRIDE_W == 0)
        is_counted = is_center
        if not ONE_STRIP:
            is_counted &= is_row_counted
        merged = ()
        new_totals = ()
        for p in tl.static_range(len(AVG)):
            spread = sum_around(divided_by_area[p][v : v + 2 * RADIUS + 1], RADIUS, AVG[p][1])
            if WANTS_VALUES:
                weighted = spread * shares_avg[p]
                if p > 0:
                    weighted += merged[p - 1]
                merged = merged + (weighted,)
            if WANTS_WEIGHTS:
                # Of the windows that hold a column what they hold of it, which is the same sum.
                term = sum_around(centers, RADIUS_H, AVG[p][0]) * spread
                if STRIDE_H > 1 or 2 * AVG[p][1] + 1 < STRIDE_W:
                    holds = _holds_windows(
                        row, column, inside[v : v + 2 * RADIUS + 1], RADIUS, AVG[p][1],
                        STRIDE_H, STRIDE_W,
                    )  # fmt: skip
                    term = tl.where(holds, term, 0.0)
                if not ONE_STRIP:
                    term = tl.where(is_row_counted, term, 0.0)
                if not ALL_INSIDE:
                    term = tl.where(inside[v + RADIUS], term, 0.0)
                new_totals = new_totals + (avg_totals[p] + term,)
        if WANTS_VALUES and len(AVG) > 0:
            ready = add_row(ready, merged, heights_of(AVG), RADIUS_H, 1)
        if WANTS_WEIGHTS:
            avg_totals = new_totals
            new_totals = ()
            for k in tl.static_range(len(NONE)):
                new_totals = new_totals + (none_totals[k] + grad * 0.0,)
            none_totals = new_totals
        new_max_totals = ()
        new_pending = ()
        for p in tl.static_range(len(MAX)):
            if CAREFUL:
                top, keeps, moves = chosen_around(tops[p], rows_above, RADIUS_H, MAX[p][0])
            else:
                top = largest_around(tops[p], RADIUS_H, MAX[p][0])
                if _watched(MAX, p):
                    if ALL_INSIDE:
                        lowest = lower(lowest, top)
                    else:
                        lowest = tl.where(is_center, lower(lowest, top), lowest)
            if WANTS_WEIGHTS:
                value = top
                if len(picks) > 0:
                    value = picked_around(picks[p], keeps, moves, RADIUS_H)
                if not (ONE_STRIP and STRIDE_H * STRIDE_W == 1 and ALL_INSIDE):
                    value = tl.where(is_counted, value, 0.0)
                new_max_totals = new_max_totals + (max_totals[p] + grad * value,)
            if WANTS_VALUES:
                share = grad * shares_max[p]
                if STRIDE_H * STRIDE_W > 1:
                    share = tl.where(is_center, share, 0.0)
                if CAREFUL:
                    going = added_around(pending[p], share, keeps, moves, RADIUS_H)
                else:
                    going = added_to_first(pending[p], share, tops[p], top, RADIUS_H, MAX[p][0])
                new_pending = new_pending + (going,)
        max_totals = new_max_totals
        new_dues = new_dues + ((new_pending, ready),)
    return new_dues, (avg_totals, max_totals, none_totals, lowest)


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


@triton.constexpr_function
def _watched(pools, number):
    """Whether NaN and -Inf would show in this pooling: of nested ones, in the outer and inner."""
    is_nested = all(a[1] >= b[1] for a, b in itertools.pairwise(pools))
    return not is_nested or number in (0, len(pools) - 1)


@triton.jit
def _take_row(
    kepts, dues, totals, grad_out, x, values, grad_out_plane, x_plane, values_plane, row,
    row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
    AVG: tl.constexpr, MAX: tl.constexpr, NONE: tl.constexpr,
    RADIUS_H: tl.constexpr, RADIUS_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, MERGED: tl.constexpr,
    HAS_VALUES: tl.constexpr, WANTS_VALUES: tl.constexpr, WANTS_WEIGHTS: tl.constexpr,
    SPREADS: tl.constexpr, AT_TOP: tl.constexpr, ONE_STRIP: tl.constexpr, CHECKED: tl.constexpr,
    CAREFUL: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Keeps an input row and, if SPREADS, spreads the gradients of the windows that it completes.

    CHECKED allows that there are no such rows on the map.
    """
    USES_X: tl.constexpr = len(MAX) > 0 or (WANTS_WEIGHTS and len(AVG) > 0)
    if USES_X:
        if not CHECKED or ((row >= 0) & (row < h)):
            kepts = _keep_row(
                kepts, x, values, x_plane, values_plane, row, group, inside,
                MAX, RADIUS_W, HAS_VALUES, CAREFUL, VECTOR, ACC,
            )  # fmt: skip
        else:
            kepts = _keep_nothing(kepts, nothing)
    if SPREADS:  # noqa: SIM102 (one is static)
        if not CHECKED or ((row - RADIUS_H >= 0) & (row - RADIUS_H < h)):
            dues, totals = _spread_row(
                dues, kepts, totals, grad_out, grad_out_plane, row - RADIUS_H,
                row_begin, row_end, h, w, group, inside, shares_avg, shares_max,
                AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                WANTS_VALUES, WANTS_WEIGHTS, AT_TOP, ONE_STRIP, CAREFUL, VECTOR, ACC,
            )  # fmt: skip
    return kepts, dues, totals


@triton.jit
def _stream(
    grad_out, x, values, grad_values, grad_out_plane, x_plane, values_plane, grad_values_plane,
    row_begin, row_end, h, w, group, in_segment, inside, is_owned, shares_avg, shares_max,
    grad_weights, first, index, per_plane,
    AVG: tl.constexpr, MAX: tl.constexpr, NONE: tl.constexpr,
    RADIUS_H: tl.constexpr, RADIUS_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, MERGED: tl.constexpr,
    HAS_VALUES: tl.constexpr, WANTS_VALUES: tl.constexpr, WANTS_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, TILED: tl.constexpr,
    ONE_STRIP: tl.constexpr, HEIGHT: tl.constexpr, UNROLL: tl.constexpr, ROUNDS: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Streams the lanes down the strip and writes both gradients.

    Returns:
        The lowest maximum of each lane, or NaN where there is any.
    """
    LENGTH: tl.constexpr = 2 * RADIUS_H + 1
    nothing = tl.full(group.shape, -0.0, ACC)
    minus_infinity = tl.full(group.shape, float("-inf"), ACC)
    kept = (
        repeated(nothing, LENGTH if WANTS_WEIGHTS and len(AVG) > 0 else 0),
        rings_of(minus_infinity, len(MAX), LENGTH),
        repeated(tl.zeros(group.shape, tl.int32), LENGTH if WANTS_VALUES and len(MAX) > 0 else 0),
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
            kepts, dues, totals = _take_row(
                kepts, dues, totals, grad_out, x, values, grad_out_plane, x_plane, values_plane,
                row + 2 * RADIUS_H,
                row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
                AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, i == 1, True, ONE_STRIP, True,
                CAREFUL, VECTOR, ACC,
            )  # fmt: skip
            dues = _moved_on(dues, nothing)
    for i in tl.static_range(2 * ABOVE if HEIGHT > 0 else 0):
        kepts, dues, totals = _take_row(
            kepts, dues, totals, grad_out, x, values, grad_out_plane, x_plane, values_plane,
            i, row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
            AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
            HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, i >= ABOVE, True, ONE_STRIP, True,
            CAREFUL, VECTOR, ACC,
        )  # fmt: skip
        dues = _moved_on(dues, nothing)
    checked_begin = row_begin - 2 * ABOVE if UNROLL == 0 else row_begin
    if UNROLL > 0 and HEIGHT == 0:
        # Up to here all input rows are on the map.
        rows = tl.maximum(tl.minimum(row_end, h - 2 * RADIUS_H) - row_begin, 0)
        checked_begin += rows // UNROLL * UNROLL
        for base in range(row_begin, checked_begin, UNROLL):
            for u in tl.static_range(UNROLL):
                kepts, dues, totals = _take_row(
                    kepts, dues, totals, grad_out, x, values, grad_out_plane, x_plane, values_plane,
                    base + u + 2 * RADIUS_H,
                    row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
                    AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                    HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, True, False, ONE_STRIP, False,
                    CAREFUL, VECTOR, ACC,
                )  # fmt: skip
                if WANTS_VALUES:
                    columns = gradients_of_row(dues, kepts, in_segment, MAX, TILED)
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
                dues = _moved_on(dues, nothing)
    for base in range(checked_begin, 1 if HEIGHT > 0 else row_end):
        for u in tl.static_range(HEIGHT if HEIGHT > 0 else 1):
            row = u if HEIGHT > 0 else base
            kepts, dues, totals = _take_row(
                kepts, dues, totals, grad_out, x, values, grad_out_plane, x_plane, values_plane,
                row + 2 * RADIUS_H,
                row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
                AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, True, UNROLL == 0, ONE_STRIP, True,
                CAREFUL, VECTOR, ACC,
            )  # fmt: skip
            if WANTS_VALUES:
                columns = gradients_of_row(dues, kepts, in_segment, MAX, TILED)
                mask = is_owned
                if UNROLL == 0:
                    mask &= _rows_on_map(row - row_begin, row_end, group)
                store_row(grad_values, grad_values_plane, row, group, columns, w, mask, VECTOR)
            dues = _moved_on(dues, nothing)
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
    RERUNS: tl.constexpr,
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

    # The gradient of the weights is the sum of such terms of all planes, tiles and strips.
    terms = grad_weights
    if WANTS_WEIGHTS:
        terms += ((plane.to(tl.int64) * tiles + tile) * strips + strip) * COUNT
    first = is_owned & (index == 0) if not TILED else in_segment + tl.zeros_like(lane) == 0
    first &= in_lanes
    lowest = _stream(
        grad_out, x, values, grad_values,
        grad_out_plane, x_plane, values_plane, grad_values_plane,
        row_begin, row_end, h, w, group, in_segment, inside, is_owned, shares_avg, shares_max,
        terms, first, index, per_plane,
        AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
        HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, ACC, COLUMNS, VECTOR, TILED,
        ONE_STRIP, HEIGHT, UNROLL, ROUNDS, HAS_VALUES,
    )  # fmt: skip
    if RERUNS and len(MAX) > 0 and WANTS_VALUES and not HAS_VALUES:
        is_special = in_lanes & ((lowest > float("-inf")) == 0)
        if tl.max(is_special.to(tl.int32), 0) > 0:
            _stream(
                grad_out, x, values, grad_values,
                grad_out_plane, x_plane, values_plane, grad_values_plane,
                row_begin, row_end, h, w, group, in_segment, inside, is_owned,
                shares_avg, shares_max, terms, first, index, per_plane,
                AVG, MAX, NONE, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                HAS_VALUES, WANTS_VALUES, WANTS_WEIGHTS, ACC, COLUMNS, VECTOR, TILED,
                ONE_STRIP, 0, 0, ROUNDS, True,
            )  # fmt: skip
