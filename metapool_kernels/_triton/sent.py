"""What a window sends back to the pixels that it holds: the form of a backward.

    "mix"     weight * gradient, of one map that all candidates share
    "stack"   the gradient, each candidate having a map of its own
    "fields"  weight * gradient + offset + slope * (pooling - shift), of one map that all share

In a mixture what averages send is the same but for its weight: it is added up along the row at once
and weighted then. In the other forms each average sends something else, which first waits, like
what maxima get, until nothing can come to its row any more, and is then handed on along the row.
So a lane asks for the gradients, and for the poolings, of its own columns alone.
"""

import triton
import triton.language as tl

from metapool_kernels._triton.forward import add_row
from metapool_kernels._triton.lanes import load_row, load_weights, weights_of, window_size
from metapool_kernels._triton.windows import divided, repeated, sum_around


@triton.jit
def load_terms(
    weights, offsets, slopes, shifts, image, channel, in_lanes,
    SHARED: tl.constexpr, COUNT: tl.constexpr, FORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """For each term of the form, from the weight on, a tuple of those of all candidates."""
    if FORM == "stack":
        # Not a number, of which Triton would keep what float32 holds, also over an area.
        terms = (repeated(tl.full((), 1.0, ACC), COUNT),)
    else:
        terms = (load_weights(weights, image, channel, in_lanes, SHARED, COUNT),)
    if FORM == "fields":
        terms = terms + (
            load_weights(offsets, image, channel, in_lanes, SHARED, COUNT),
            load_weights(slopes, image, channel, in_lanes, SHARED, COUNT),
            load_weights(shifts, image, channel, in_lanes, SHARED, COUNT),
        )
    return terms


@triton.jit
def shares_of(terms, POOLS: tl.constexpr, OVER_AREA: tl.constexpr):
    """Of these poolings the weights or, of fields, all four terms.

    With OVER_AREA they are those of sums, which are not divided: what is sent is already.
    """
    shares = weights_of(terms[0], POOLS, OVER_AREA)
    if len(terms) > 1:
        offsets = weights_of(terms[1], POOLS, OVER_AREA)
        slopes = weights_of(terms[2], POOLS, OVER_AREA)
        shifts = weights_of(terms[3], POOLS, False)
        of_each = ()
        for p in tl.static_range(len(POOLS)):
            slope, shift = slopes[p], shifts[p]
            if OVER_AREA:
                slope /= (2 * POOLS[p][0] + 1) * (2 * POOLS[p][1] + 1)
                shift *= (2 * POOLS[p][0] + 1) * (2 * POOLS[p][1] + 1)
            of_each = of_each + ((shares[p], offsets[p], slope, shift),)
        shares = of_each
    return shares


@triton.jit
def sent(grad, pooled, share, FORM: tl.constexpr):
    """What a window sends. Without a slope its pooling does not matter, even if it is no number."""
    if FORM == "fields":
        weight, offset, slope, shift = share
        deviation = tl.where(slope != 0.0, pooled - shift, 0.0)
        field = weight * grad + offset + slope * deviation
    else:
        field = grad * share
    return field


@triton.jit
def load_grads(
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
def load_grads_of_each(
    grads, grad_out, plane, step, row, group, inside,
    POOLS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, FORM: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """For each of these poolings the gradients of a lane's columns: ``grads`` where all share them.

    Those of candidates that have maps of their own are ``step`` elements apart.
    """
    of_each = repeated(grads, len(POOLS))
    if FORM == "stack":
        of_each = ()
        for p in tl.static_range(len(POOLS)):
            at = plane + POOLS[p][2] * step if POOLS[p][2] > 0 else plane
            loaded = load_grads(
                grad_out, at, row, group, inside,
                len(inside), 0, STRIDE_H, STRIDE_W, VECTOR, ACC,
            )  # fmt: skip
            of_each = of_each + (loaded,)
    return of_each


@triton.jit
def send_of_averages(
    waiting, sums, grads, shares, row, column, h, w, is_center, NUMBER: tl.constexpr,
    AVG: tl.constexpr, RADIUS_H: tl.constexpr, MERGED: tl.constexpr, MASKED: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """Adds what the averages around one pixel send to the rows that they hold.

    Args:
        waiting: for each average a ring of what is sent to rows.
        sums: for each average a ring of sums along rows, which fields depend on.
        grads: for each average the gradients of a lane's columns, of which it is the NUMBER-th.
        shares: of averages.
        row, column, h, w: where the pixel is on which map.
        is_center: whether there is a window around it, which is asked if MASKED.
        others: as of the kernel.
    """
    new = ()
    for p in tl.static_range(len(AVG)):
        pooled = 0.0
        if not MERGED:
            count = window_size(row, h, AVG[p][0]) * window_size(column, w, AVG[p][1])
            count = count.to(grads[p][NUMBER].dtype)
        if FORM == "fields":
            pooled = sum_around(sums[p], RADIUS_H, AVG[p][0])
            if not MERGED:
                pooled = divided(pooled, count)
        field = sent(grads[p][NUMBER], pooled, shares[p], FORM)
        if not MERGED:
            field = divided(field, count)
        if MASKED:
            field = tl.where(is_center, field, 0.0)
        new = new + (add_row(waiting[p], (field,), (AVG[p][0],), RADIUS_H, 1),)
    return new
