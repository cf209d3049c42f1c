"""Backward, row by row: what is kept of an input row, and where its windows' gradients go.

What a lane keeps of the last rows are, for each of its columns, what averages need of them, their
maxima along the row, where these stand and the values there. Averages need the pixels or, where
what they send depends on themselves, their sums along the row. What is due to the rows that are not
finished are gradients of maxima that wait by pooling for their column, and those of averages: they
belong where they are or, of other forms than a mixture, wait by pooling to be handed along the row.
"""

import itertools

import triton
import triton.language as tl

from metapool_kernels._triton.forward import add_row, heights_of
from metapool_kernels._triton.lanes import load_row, window_size
from metapool_kernels._triton.segments import widest
from metapool_kernels._triton.sent import load_grads, load_grads_of_each, send_of_averages, sent
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
    sum_around,
)


@triton.jit
def rows_on_map(row, h, like):
    """Whether a row is on the map, for every lane: the interpreter makes integers of scalars."""
    return (row + tl.zeros_like(like) >= 0) & (row + tl.zeros_like(like) < h)


@triton.jit
def _keep_pixels(
    kept, linear, pooled, compared, inside,
    MAX: tl.constexpr, RADIUS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Keeps of a row, for one column, ``linear``, its maxima, where they stand and their values."""
    kept_linear, tops, codes, picks = kept
    new_linear = ()
    for p in tl.static_range(len(kept_linear)):
        new_linear = new_linear + (pushed(kept_linear[p], linear[p]),)
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
        codes = pushed(codes, packed(keeps, moves, compared[0].shape))
    return new_linear, new_tops, codes, new_picks


@triton.jit
def _zero_beyond(pixels, inside):
    """Pixels, with zeros for those that are not on the map."""
    zeroed = ()
    for i in tl.static_range(len(pixels)):
        zeroed = zeroed + (tl.where(inside[i], pixels[i], 0.0),)
    return zeroed


@triton.jit
def _keep_row(
    kepts, x, values, x_plane, values_plane, row, group, inside,
    AVG: tl.constexpr, MAX: tl.constexpr, RADIUS: tl.constexpr, HAS_VALUES: tl.constexpr,
    FORM: tl.constexpr, CAREFUL: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loads an input row and keeps of it what windows need that hold it."""
    COLUMNS: tl.constexpr = len(kepts)
    kept_linear, _, _, picks = kepts[0]
    # So far from a lane's columns averages need pixels: all of their windows, or those alone.
    AROUND: tl.constexpr = RADIUS if FORM == "fields" else 0
    compared = ()
    pooled = ()
    if len(MAX) > 0:
        compared = load_row(
            x, x_plane, row, group, inside, COLUMNS, RADIUS, VECTOR, ACC, float("-inf")
        )
    if len(picks) > 0:
        pooled = load_row(values, values_plane, row, group, inside, COLUMNS, RADIUS, VECTOR, ACC)
    inside_lane = inside[RADIUS - AROUND : RADIUS + COLUMNS + AROUND]
    if len(kept_linear) > 0:
        if len(MAX) == 0 or HAS_VALUES:
            lane = load_row(
                values, values_plane, row, group, inside_lane, COLUMNS, AROUND, VECTOR, ACC
            )
        else:
            lane = _zero_beyond(compared[RADIUS - AROUND : RADIUS + COLUMNS + AROUND], inside_lane)
    new = ()
    for v in tl.static_range(COLUMNS):
        linear = ()
        if len(kept_linear) > 0:
            if FORM == "fields":
                for p in tl.static_range(len(AVG)):
                    linear = linear + (sum_around(lane, RADIUS + v, AVG[p][1]),)
            else:
                linear = (lane[v],)
        kept = _keep_pixels(
            kepts[v], linear, pooled[v : v + 2 * RADIUS + 1], compared[v : v + 2 * RADIUS + 1],
            inside[v : v + 2 * RADIUS + 1], MAX, RADIUS, CAREFUL,
        )  # fmt: skip
        new = new + (kept,)
    return new


@triton.jit
def _keep_nothing(kepts, nothing):
    """The same of a row that is not on the map."""
    new = ()
    for v in tl.static_range(len(kepts)):
        linear, tops, codes, picks = kepts[v]
        new_linear = ()
        for p in tl.static_range(len(linear)):
            new_linear = new_linear + (pushed(linear[p], nothing),)
        new_tops = ()
        new_picks = ()
        for p in tl.static_range(len(tops)):
            new_tops = new_tops + (pushed(tops[p], nothing - float("inf")),)
            if len(picks) > 0:
                new_picks = new_picks + (pushed(picks[p], nothing),)
        if len(codes) > 0:
            codes = pushed(codes, tl.zeros(nothing.shape, tl.int32))
        new = new + ((new_linear, new_tops, codes, new_picks),)
    return new


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
    dues, kepts, totals, grad_out, plane, step, row, row_begin, row_end, h, w, group, inside,
    shares_avg, shares_max,
    AVG: tl.constexpr, MAX: tl.constexpr, NONE: tl.constexpr, FORM: tl.constexpr,
    RADIUS_H: tl.constexpr, RADIUS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, MERGED: tl.constexpr,
    WANTS_VALUES: tl.constexpr, WANTS_WEIGHTS: tl.constexpr,
    AT_TOP: tl.constexpr, ONE_STRIP: tl.constexpr,
    CAREFUL: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Spreads the gradients of the windows around a row over the rows that these hold.

    What averages get in a mixture goes where it belongs, all else waits by pooling for its column.
    """
    COLUMNS: tl.constexpr = len(dues)
    ALL_INSIDE: tl.constexpr = VECTOR or COLUMNS == 1  # those of a lane are on the map, or none is
    MIXES: tl.constexpr = FORM == "mix"
    inside_lane = inside[RADIUS : RADIUS + COLUMNS]
    grads = ()
    grads_lane = ()
    if MIXES:
        grads = load_grads(
            grad_out, plane, row, group, inside,
            COLUMNS, RADIUS, STRIDE_H, STRIDE_W, VECTOR, ACC,
        )  # fmt: skip
        grads_lane = grads[RADIUS : RADIUS + COLUMNS]
    elif FORM == "fields":
        grads_lane = load_grads(
            grad_out, plane, row, group, inside_lane,
            COLUMNS, 0, STRIDE_H, STRIDE_W, VECTOR, ACC,
        )  # fmt: skip
    grads_avg = load_grads_of_each(
        grads_lane, grad_out, plane, step, row, group, inside_lane,
        AVG, STRIDE_H, STRIDE_W, FORM, VECTOR, ACC,
    )  # fmt: skip
    grads_max = load_grads_of_each(
        grads_lane, grad_out, plane, step, row, group, inside_lane,
        MAX, STRIDE_H, STRIDE_W, FORM, VECTOR, ACC,
    )  # fmt: skip
    rows_above = ()
    for i in tl.static_range(RADIUS_H if AT_TOP else 0):
        rows_above = rows_above + (row + (i - RADIUS_H) + tl.zeros_like(group) >= 0,)
    # For each average of a mixture the gradients of its windows, divided.
    divided_by_area = ()
    for p in tl.static_range(len(AVG) if MIXES else 0):
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
        is_row_counted = rows_on_map(row - row_begin, row_end - row_begin, group)
    new_dues = ()
    avg_totals, max_totals, none_totals, lowest = totals
    for v in tl.static_range(COLUMNS):
        linear, tops, _, picks = kepts[v]
        pending, ready = dues[v]
        column = group * COLUMNS + v
        is_center = inside[v + RADIUS]
        if STRIDE_H > 1 or STRIDE_W > 1:
            is_center &= (row % STRIDE_H + tl.zeros_like(group) == 0) & (column % STRIDE_W == 0)
        is_counted = is_center
        if not ONE_STRIP:
            is_counted &= is_row_counted
        merged = ()
        new_totals = ()
        for p in tl.static_range(len(AVG) if MIXES else 0):
            spread = sum_around(divided_by_area[p][v : v + 2 * RADIUS + 1], RADIUS, AVG[p][1])
            if WANTS_VALUES:
                weighted = spread * shares_avg[p]
                if p > 0:
                    weighted += merged[p - 1]
                merged = merged + (weighted,)
            if WANTS_WEIGHTS:
                # Of the windows that hold a column what they hold of it, which is the same sum.
                term = sum_around(linear[0], RADIUS_H, AVG[p][0]) * spread
                if STRIDE_H > 1 or AVG[p][1] + 1 < STRIDE_W:
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
            if MIXES:
                ready = (add_row(ready[0], merged, heights_of(AVG), RADIUS_H, 1),)
            else:
                ready = send_of_averages(
                    ready, linear, grads_avg, shares_avg, row, column, h, w, is_center, v,
                    AVG, RADIUS_H, MERGED, STRIDE_H * STRIDE_W > 1 or not ALL_INSIDE, FORM,
                )  # fmt: skip
        if WANTS_WEIGHTS:
            avg_totals = new_totals
            new_totals = ()
            for k in tl.static_range(len(NONE)):
                new_totals = new_totals + (none_totals[k] + grads_lane[v] * 0.0,)
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
                new_max_totals = new_max_totals + (max_totals[p] + grads_max[p][v] * value,)
            if WANTS_VALUES:
                share = sent(grads_max[p][v], top, shares_max[p], FORM)
                if STRIDE_H * STRIDE_W > 1 or ((CAREFUL or not MIXES) and not ALL_INSIDE):
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
def moved_on(dues, nothing):
    """What is due without the oldest row, and with a new one."""
    moved = ()
    for v in tl.static_range(len(dues)):
        pending, ready = dues[v]
        new_pending = ()
        for p in tl.static_range(len(pending)):
            new_pending = new_pending + (pushed(pending[p], nothing),)
        new_ready = ()
        for p in tl.static_range(len(ready)):
            new_ready = new_ready + (pushed(ready[p], nothing),)
        moved = moved + ((new_pending, new_ready),)
    return moved


@triton.constexpr_function
def _watched(pools, number):
    """Whether NaN and -Inf would show in this pooling: of nested ones, in the outer and inner."""
    is_nested = all(a[1] >= b[1] for a, b in itertools.pairwise(pools))
    return not is_nested or number in (0, len(pools) - 1)


@triton.jit
def take_row(
    kepts, dues, totals, grad_out, x, values, grad_out_plane, step, x_plane, values_plane, row,
    row_begin, row_end, h, w, group, inside, shares_avg, shares_max, nothing,
    AVG: tl.constexpr, MAX: tl.constexpr, NONE: tl.constexpr, FORM: tl.constexpr,
    RADIUS_H: tl.constexpr, RADIUS_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, MERGED: tl.constexpr,
    HAS_VALUES: tl.constexpr, WANTS_VALUES: tl.constexpr, WANTS_WEIGHTS: tl.constexpr,
    SPREADS: tl.constexpr, AT_TOP: tl.constexpr, ONE_STRIP: tl.constexpr, CHECKED: tl.constexpr,
    CAREFUL: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Keeps an input row and, if SPREADS, spreads the gradients of the windows that it completes.

    CHECKED allows that there are no such rows on the map.
    """
    USES_AVG: tl.constexpr = len(AVG) > 0 and (WANTS_WEIGHTS or FORM == "fields")
    USES_X: tl.constexpr = len(MAX) > 0 or USES_AVG
    if USES_X:
        if not CHECKED or ((row >= 0) & (row < h)):
            kepts = _keep_row(
                kepts, x, values, x_plane, values_plane, row, group, inside,
                AVG, MAX, RADIUS_W, HAS_VALUES, FORM, CAREFUL, VECTOR, ACC,
            )  # fmt: skip
        else:
            kepts = _keep_nothing(kepts, nothing)
    if SPREADS:  # noqa: SIM102 (one is static)
        if not CHECKED or ((row - RADIUS_H >= 0) & (row - RADIUS_H < h)):
            dues, totals = _spread_row(
                dues, kepts, totals, grad_out, grad_out_plane, step, row - RADIUS_H,
                row_begin, row_end, h, w, group, inside, shares_avg, shares_max,
                AVG, MAX, NONE, FORM, RADIUS_H, RADIUS_W, STRIDE_H, STRIDE_W, MERGED,
                WANTS_VALUES, WANTS_WEIGHTS, AT_TOP, ONE_STRIP, CAREFUL, VECTOR, ACC,
            )  # fmt: skip
    return kepts, dues, totals
