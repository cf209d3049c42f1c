"""Forward: every candidate pooling of a strip of rows, and what their form asks for, in one pass.

A program streams a block of lanes down a strip of rows. Each input row is combined along the row
for every width; sums go at once to all outputs whose windows hold the row, maxima wait in rings
until the last row of their window has come. Nothing but what the form asks for (:mod:`.forms`) is
ever written.
"""

import triton
import triton.language as tl

from metapool_kernels._triton.forms import (
    add_moments,
    add_products,
    inside_output,
    no_terms,
    order_of,
    put,
    store_outputs,
    store_terms,
)
from metapool_kernels._triton.lanes import (
    first_of,
    inside_row,
    load_rows,
    load_weights,
    locate,
    weights_of,
    window_size,
)
from metapool_kernels._triton.windows import (
    chosen_around,
    divided,
    doubled_largest_around,
    largest_around,
    picked_around,
    pushed,
    rings_of,
    sum_around,
)


@triton.jit
def add_row(pending, sums, RADII: tl.constexpr, AHEAD: tl.constexpr, STRIDE: tl.constexpr):
    """Adds a row's sums to the outputs whose windows hold it.

    Args:
        pending: for each output that is not finished, from the oldest, its sum so far.
        sums: those along the row, of one pooling or of several, weighted and added up: the last
            holds all of them, the one before all but the least high, and so on.
        RADII: the heights of these poolings, as radii, not ascending.
        AHEAD: rows from the oldest output's center to this one.
        STRIDE: rows between two outputs.
    """
    new = ()
    for j in tl.static_range(len(pending)):
        if AHEAD - j * STRIDE >= -RADII[0] and AHEAD - j * STRIDE <= RADII[0]:
            new = new + (pending[j] + sums[_count_holding(RADII, AHEAD - j * STRIDE) - 1],)
        else:
            new = new + (pending[j],)
    return new


@triton.constexpr_function
def _count_holding(radii, distance):
    return sum(-radius <= distance <= radius for radius in radii)


@triton.constexpr_function
def heights_of(pools):
    return tuple(pool[0] for pool in pools)


@triton.jit
def _take_pixels(
    state, pooled, compared, inside, shares,
    AVG: tl.constexpr, MAX: tl.constexpr, RADIUS: tl.constexpr,
    AHEAD: tl.constexpr, STRIDE: tl.constexpr, MERGED: tl.constexpr, HAS_VALUES: tl.constexpr,
):  # fmt: skip
    """Adds what a row gives for each pooling to the state of one column."""
    pending, tops, picks = state
    if MERGED:
        if len(AVG) > 0:
            merged = ()
            for p in tl.static_range(len(AVG)):
                scaled = shares[p] * sum_around(pooled, RADIUS, AVG[p][1])
                if p > 0:
                    scaled += merged[p - 1]
                merged = merged + (scaled,)
            pending = (add_row(pending[0], merged, heights_of(AVG), AHEAD, STRIDE),)
    else:
        new_pending = ()
        for p in tl.static_range(len(AVG)):
            sums = (sum_around(pooled, RADIUS, AVG[p][1]),)
            added = add_row(pending[p], sums, (AVG[p][0],), AHEAD, STRIDE)
            new_pending = new_pending + (added,)
        pending = new_pending
    new_tops = ()
    new_picks = ()
    for p in tl.static_range(len(MAX)):
        if HAS_VALUES:
            top, keeps, moves = chosen_around(compared, inside, RADIUS, MAX[p][1])
            pick = picked_around(pooled, keeps, moves, RADIUS)
            new_picks = new_picks + (pushed(picks[p], pick),)
        else:
            top = largest_around(compared, RADIUS, MAX[p][1])
        new_tops = new_tops + (pushed(tops[p], top),)
    return pending, new_tops, new_picks


@triton.jit
def _take_row(
    states, x, values, x_plane, values_plane, row, h, group, inside, shares,
    AVG: tl.constexpr, MAX: tl.constexpr, RADIUS: tl.constexpr,
    AHEAD: tl.constexpr, STRIDE: tl.constexpr, MERGED: tl.constexpr, HAS_VALUES: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loads an input row and adds it to the state of each column."""
    COLUMNS: tl.constexpr = len(states)
    # Of blocks, not of scalars: the interpreter would make integers of these.
    on_map = (row + tl.zeros_like(group) >= 0) & (row + tl.zeros_like(group) < h)
    present = ()
    for i in tl.static_range(len(inside)):
        present = present + (inside[i] & on_map,)
    pooled, compared = load_rows(
        x, values, x_plane, values_plane, row, group, present,
        COLUMNS, RADIUS, len(MAX) > 0, HAS_VALUES, VECTOR, ACC,
    )  # fmt: skip
    new = ()
    for v in tl.static_range(COLUMNS):
        state = _take_pixels(
            states[v], pooled[v : v + 2 * RADIUS + 1], compared[v : v + 2 * RADIUS + 1],
            inside[v : v + 2 * RADIUS + 1], shares,
            AVG, MAX, RADIUS, AHEAD, STRIDE, MERGED, HAS_VALUES,
        )  # fmt: skip
        new = new + (state,)
    return new


@triton.jit
def _take_no_row(states, lowest, nothing):
    """What an input row beyond the map does to the state of each column."""
    new = ()
    for v in tl.static_range(len(states)):
        pending, tops, picks = states[v]
        new_tops = ()
        for p in tl.static_range(len(tops)):
            new_tops = new_tops + (pushed(tops[p], lowest),)
        new_picks = ()
        for p in tl.static_range(len(picks)):
            new_picks = new_picks + (pushed(picks[p], nothing),)
        new = new + ((pending, new_tops, new_picks),)
    return new


@triton.jit
def _average(
    total, row, column, h, w,
    RADIUS_H: tl.constexpr, RADIUS_W: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A sum over what is on the map of its window, or over the WHOLE of it."""
    AREA: tl.constexpr = (2 * RADIUS_H + 1) * (2 * RADIUS_W + 1)
    if not WHOLE:
        count = window_size(row, h, RADIUS_H) * window_size(column, w, RADIUS_W)
        total = divided(total, count.to(total.dtype))
    elif AREA > 1:
        total = divided(total, tl.full(column.shape, AREA, total.dtype))
    return total


@triton.jit
def _finish_pixel(
    state, shares_avg, shares_max, zeros, row, column, h, w,
    AVG: tl.constexpr, MAX: tl.constexpr, COUNT: tl.constexpr, RADIUS: tl.constexpr,
    MERGED: tl.constexpr, WHOLE: tl.constexpr, HAS_VALUES: tl.constexpr, MIXES: tl.constexpr,
):  # fmt: skip
    """The outputs of a column whose windows are complete, and its state without them."""
    pending, tops, picks = state
    outputs = (zeros,) if MIXES else ()
    if MERGED:
        if len(AVG) > 0:
            outputs = (outputs[0] + pending[0][0],)
    else:
        for p in tl.static_range(len(AVG)):
            average = _average(pending[p][0], row, column, h, w, AVG[p][0], AVG[p][1], WHOLE)
            outputs = put(outputs, average, shares_avg, p, MIXES)
    on_map = ()
    if HAS_VALUES:
        for i in tl.static_range(2 * RADIUS + 1):
            at = row + (i - RADIUS) + tl.zeros_like(column)
            on_map = on_map + ((at >= 0) & (at < h),)
    for p in tl.static_range(len(MAX)):
        if HAS_VALUES:
            _, keeps, moves = chosen_around(tops[p], on_map, RADIUS, MAX[p][0])
            pick = picked_around(picks[p], keeps, moves, RADIUS)
        else:
            pick = doubled_largest_around(tops[p], RADIUS, MAX[p][0])
        outputs = put(outputs, pick, shares_max, p, MIXES)
    for _ in tl.static_range(0 if MIXES else COUNT - len(outputs)):  # of the candidate "none"
        outputs = outputs + (tl.zeros_like(zeros),)
    moved = ()
    for g in tl.static_range(len(pending)):
        moved = moved + (pushed(pending[g], tl.full(zeros.shape, -0.0, zeros.dtype)),)
    return outputs, (moved, tops, picks)


@triton.jit(
    do_not_specialize=[
        "channels", "h", "w", "h_out", "w_out", "groups", "lanes", "strips", "strip_rows"
    ],
)  # fmt: skip
def meta_pool_fwd_kernel(
    x,
    values,
    weights,
    constants,
    grad_out,
    out,
    channels,
    h,
    w,
    h_out,
    w_out,
    groups,
    lanes,
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
    SHARED_WEIGHTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    ONE_STRIP: tl.constexpr,
    HEIGHT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Computes all ``P_k(values)``, the maxima picked by ``x``, and writes what FORM asks for.

    A mixture takes ``weights`` and, if not None, ``constants``; products take ``grad_out`` and
    ``weights``, which are their shifts. ``out`` is a map or, where terms are written, an array.

    AVG and MAX hold (radius_h, radius_w, k) for each of the COUNT candidates, the higher first; the
    average of one pixel is the identity. NONE holds those that are zero. With MERGED the divisor of
    an average does not depend on the place, so that a mixture sums all of them up together. HEIGHT
    is that of a map so low that one round of the loop does all of it, else 0.
    """
    tl.static_assert(STRIDE_W == 1 or COLUMNS == 1, "columns of one lane are neighbours")
    pid = tl.program_id(0)  # strips of the same lanes follow each other and share their halos
    row_begin = 0 if ONE_STRIP else (pid % strips) * strip_rows
    row_end = tl.minimum(row_begin + strip_rows, h_out)
    h = HEIGHT if HEIGHT > 0 else h
    lane = (pid // strips).to(lanes.dtype) * BLOCK + tl.arange(0, BLOCK)
    in_lanes = lane < lanes
    image, channel, group = locate(lane, groups, channels, CHANNELS_LAST)
    x_plane = first_of(x, image, channel)
    values_plane = first_of(values, image, channel)
    if FORM == "mix" or FORM == "stack":
        out_plane = first_of(out, image, channel)
    if FORM == "products":
        grad_out_plane = first_of(grad_out, image, channel)
    group_in = group * STRIDE_W  # one column to a lane where STRIDE_W is not 1
    inside = inside_row(group_in, w, in_lanes, COLUMNS, RADIUS_W)
    MIXES: tl.constexpr = FORM == "mix"
    TOGETHER: tl.constexpr = MERGED and MIXES
    ORDER: tl.constexpr = (0,) if MIXES else order_of(AVG, MAX, NONE)
    weight = ()
    if weights is not None:
        weight = load_weights(weights, image, channel, in_lanes, SHARED_WEIGHTS, COUNT)
    shares = weights_of(weight, AVG if MIXES else (), MERGED)
    shares_max = weights_of(weight, MAX if MIXES else (), False)
    nothing = tl.full((BLOCK,), -0.0, ACC)  # adding it changes no number
    lowest = tl.full((BLOCK,), float("-inf"), ACC)
    zeros = nothing
    if MIXES:
        for k in tl.static_range(len(NONE)):
            zeros += weight[NONE[k]] * 0
    if constants is not None:
        zeros += load_weights(constants, image, channel, in_lanes, False, 1)[0]
    if FORM == "moments" or FORM == "products":
        terms = no_terms(row_end - row_begin, w_out, group, nothing, ORDER, FORM, COLUMNS)

    LENGTH: tl.constexpr = 2 * RADIUS_H + 1
    STEP: tl.constexpr = min(STRIDE_H, LENGTH)  # input rows for each output row
    PENDING: tl.constexpr = (LENGTH - 1) // STRIDE_H + 1
    state = (
        rings_of(nothing, min(len(AVG), 1) if TOGETHER else len(AVG), PENDING),
        rings_of(lowest, len(MAX), LENGTH),
        rings_of(nothing, len(MAX) if HAS_VALUES else 0, LENGTH),
    )
    states = ()
    for _ in tl.static_range(COLUMNS):
        states = states + (state,)
    # Where the strip begins with the map, no row is above it.
    for i in tl.static_range(RADIUS_H if ONE_STRIP else 0, LENGTH - STEP):
        if HEIGHT == 0 or i - RADIUS_H < HEIGHT:
            states = _take_row(
                states, x, values, x_plane, values_plane, row_begin * STRIDE_H - RADIUS_H + i,
                h, group_in, inside, shares,
                AVG, MAX, RADIUS_W, i - RADIUS_H, STRIDE_H, TOGETHER, HAS_VALUES,
                VECTOR, ACC,
            )  # fmt: skip
        else:
            states = _take_no_row(states, lowest, nothing)
    for base in range(row_begin, 1 if HEIGHT > 0 else row_end, UNROLL):
        for u in tl.static_range(UNROLL):
            row_out = u if HEIGHT > 0 else base + u
            for i in tl.static_range(STEP):
                if HEIGHT == 0 or u * STRIDE_H + RADIUS_H - STEP + 1 + i < HEIGHT:
                    states = _take_row(
                        states, x, values, x_plane, values_plane,
                        row_out * STRIDE_H + (RADIUS_H - STEP + 1 + i),
                        h, group_in, inside, shares,
                        AVG, MAX, RADIUS_W, RADIUS_H - STEP + 1 + i, STRIDE_H, TOGETHER, HAS_VALUES,
                        VECTOR, ACC,
                    )  # fmt: skip
                else:
                    states = _take_no_row(states, lowest, nothing)
            pixels = ()
            moved = ()
            for v in tl.static_range(COLUMNS):
                column = (group * COLUMNS + v) * STRIDE_W
                outputs, state = _finish_pixel(
                    states[v], shares, shares_max, zeros, row_out * STRIDE_H, column, h, w,
                    AVG, MAX, COUNT, RADIUS_H, TOGETHER, MERGED, HAS_VALUES, MIXES,
                )  # fmt: skip
                pixels = pixels + (outputs,)
                moved = moved + (state,)
            states = moved
            mask = in_lanes & (row_out + tl.zeros_like(group) < row_end)
            if FORM == "mix" or FORM == "stack":
                store_outputs(
                    out, out_plane, row_out, group, pixels, w_out, mask, channels, ORDER, VECTOR
                )
            else:
                inside_out = inside_output(group, w_out, mask, COLUMNS, VECTOR)
                if FORM == "moments":
                    begins = row_out + tl.zeros_like(group) == row_begin
                    terms = add_moments(terms, pixels, begins, inside_out)
                else:
                    terms = add_products(
                        terms, pixels, grad_out, grad_out_plane, row_out, group, inside_out, weight,
                        ORDER, VECTOR, ACC,
                    )  # fmt: skip
    if FORM == "moments" or FORM == "products":
        store_terms(out, terms, pid % strips, lane, lanes, in_lanes, ORDER)
