"""What becomes of the poolings of a pixel: the form of a forward.

A pixel has one output in a mixture, the weighted sum; in all other forms it has one of each
candidate: the averages first, then the maxima, then those that are zero.

    "mix"       the sum is written, from a constant of each plane on where there is one
    "stack"     all poolings are written, side by side
    "moments"   of each lane and candidate the first value in a strip, and the sums of deviations
                from it and of their squares, are written at the end of the strip
    "products"  the sum of another map, and those of its products with deviations from given shifts

The first value is one of those that are summed up. So for n values the square of its distance from
their mean is no more than the sum of all squares, and what cancels later is bounded by n.
"""

import triton
import triton.language as tl

from metapool_kernels._triton.lanes import load_row, store_row
from metapool_kernels._triton.windows import repeated


@triton.constexpr_function
def order_of(avg, max, none):
    """Which candidate each output of a pixel is, where it has one of each."""
    return tuple(pool[2] for pool in (*avg, *max)) + tuple(none)


@triton.jit
def put(outputs, pooled, shares, NUMBER: tl.constexpr, MIXES: tl.constexpr):
    """Adds a pooling to the mixture, or puts it behind the others."""
    return (outputs[0] + shares[NUMBER] * pooled,) if MIXES else outputs + (pooled,)


@triton.jit
def _columns_of(pixels, NUMBER: tl.constexpr):
    """One output of all of a lane's columns."""
    columns = ()
    for v in tl.static_range(len(pixels)):
        columns = columns + (pixels[v][NUMBER],)
    return columns


@triton.jit
def store_outputs(
    out, plane, row, group, pixels, w, mask, channels, ORDER: tl.constexpr, VECTOR: tl.constexpr
):
    """Writes a row of all outputs; those of a candidate have so many channels."""
    step = tl.cast(channels, tl.int64) * out.stride_c
    for i in tl.static_range(len(pixels[0])):
        at = plane + ORDER[i] * step if ORDER[i] > 0 else plane
        store_row(out, at, row, group, _columns_of(pixels, i), w, mask, VECTOR)


@triton.jit
def no_terms(
    rows, w, group, nothing, ORDER: tl.constexpr, FORM: tl.constexpr, COLUMNS: tl.constexpr
):
    """Before any row: what all candidates share, and what each has of its own.

    Moments share the number of values, known from the start.
    """
    zero = nothing * 0
    if FORM == "moments":
        count = rows * tl.minimum(w - group * COLUMNS, COLUMNS)
        terms = count.to(zero.dtype), repeated((zero, zero, zero), len(ORDER))
    else:
        terms = zero, repeated((zero,), len(ORDER))
    return terms


@triton.jit
def inside_output(group, w, mask, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """Which of a lane's columns there are; vectors are whole."""
    inside = ()
    for v in tl.static_range(COLUMNS):
        inside = inside + (mask if VECTOR else mask & (group * COLUMNS + v < w),)
    return inside


@triton.jit
def add_moments(terms, pixels, begins, inside):
    """Adds a row to the moments; where the strip ``begins``, its first value is kept."""
    count, moments = terms
    new = ()
    for i in tl.static_range(len(moments)):
        shift, first, second = moments[i]
        value = pixels[0][i]
        finite = value - value == 0.0
        shift = tl.where(begins, tl.where(finite, value, 0.0), shift)
        for v in tl.static_range(len(pixels)):
            apart = tl.where(inside[v], pixels[v][i] - shift, 0.0)
            first += apart
            second += apart * apart
        new = new + ((shift, first, second),)
    return count, new


@triton.jit
def add_products(
    terms, pixels, grad_out, plane, row, group, inside, shifts,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds a row of the other map, and its products."""
    total, products = terms
    COLUMNS: tl.constexpr = len(pixels)
    grads = load_row(grad_out, plane, row, group, inside, COLUMNS, 0, VECTOR, ACC)
    for v in tl.static_range(COLUMNS):
        total += grads[v]
    new = ()
    for i in tl.static_range(len(products)):
        sum = products[i][0]
        for v in tl.static_range(COLUMNS):
            product = grads[v] * (pixels[v][i] - shifts[ORDER[i]])
            sum += tl.where(inside[v], product, 0.0)  # beyond the map a pooling may be NaN
        new = new + ((sum,),)
    return total, new


@triton.jit
def store_terms(out, terms, strip, lane, lanes, mask, ORDER: tl.constexpr):
    """Writes the terms of each lane to an array of shape (strips, 1 + K * terms, lanes)."""
    shared, own = terms
    EACH: tl.constexpr = len(own[0])
    step = tl.cast(lanes, tl.int64)
    at = out + tl.cast(strip, tl.int64) * (1 + len(own) * EACH) * step + lane
    tl.store(at, shared, mask=mask)
    for i in tl.static_range(len(own)):
        for j in tl.static_range(EACH):
            tl.store(at + (1 + ORDER[i] * EACH + j) * step, own[i][j], mask=mask)
