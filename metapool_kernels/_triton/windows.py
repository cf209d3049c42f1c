"""Device functions that combine the pixels of a window, first along rows, then down columns.

A *ring* is a tuple of the same thing for the last rows, oldest first; everything in it stays in
registers. Radii are compile-time constants, so that every loop over a window is unrolled. Of equal
elements the first in row-major order is the maximum, of NaN the last.
"""

import triton
import triton.language as tl


@triton.jit
def repeated(value, TIMES: tl.constexpr):
    """A tuple of the same value, such as a ring in which nothing has been pushed yet."""
    values = ()
    for _ in tl.static_range(TIMES):
        values = values + (value,)
    return values


@triton.jit
def rings_of(value, COUNT: tl.constexpr, LENGTH: tl.constexpr):
    """A tuple of COUNT such rings."""
    rings = ()
    for _ in tl.static_range(COUNT):
        rings = rings + (repeated(value, LENGTH),)
    return rings


@triton.jit
def pushed(ring, item):
    """The ring without its oldest item, and with a new one."""
    return ring[1:] + (item,)


@triton.jit
def right_wins(left, right, CAREFUL: tl.constexpr):
    """Whether ``right``, which comes later in the window, is the maximum of the two.

    Only if CAREFUL is the answer right for NaN too.
    """
    return (right > left) | (right != right) if CAREFUL else right > left


@triton.jit
def largest(left, right):
    """The maximum where it does not matter which of equal elements it is."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lower(left, right):
    """The minimum, or NaN."""
    return tl.minimum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divided(total, count):
    """The quotient, rounded to the nearest: float32 would be divided less exactly."""
    return tl.div_rn(total, count) if total.dtype == tl.float32 else total / count


@triton.jit
def sum_around(row, CENTER: tl.constexpr, RADIUS: tl.constexpr):
    """Sum of the elements up to RADIUS from the center; a wider one shares a narrower."""
    total = row[CENTER]
    for d in tl.static_range(1, RADIUS + 1):
        total += row[CENTER - d] + row[CENTER + d]
    return total


@triton.jit
def largest_around(row, CENTER: tl.constexpr, RADIUS: tl.constexpr):
    """Maximum of the elements up to RADIUS from the center."""
    top = row[CENTER]
    for d in tl.static_range(1, RADIUS + 1):
        top = largest(largest(row[CENTER - d], top), row[CENTER + d])
    return top


@triton.jit
def runs_of(ring, LENGTH: tl.constexpr, SPAN: tl.constexpr):
    """The maxima of neighbours, from those of SPAN items to those of twice as many."""
    runs = ()
    for i in tl.static_range(LENGTH):
        runs = runs + (largest(ring[i], ring[i + SPAN]),)
    return runs


@triton.jit
def doubled_largest_around(ring, CENTER: tl.constexpr, RADIUS: tl.constexpr):
    """The same from maxima of 2, 4 and 8 neighbours, which the next windows share."""
    SIZE: tl.constexpr = 2 * RADIUS + 1
    runs = ring[CENTER - RADIUS : CENTER + RADIUS + 1]
    if SIZE >= 2:
        runs = runs_of(runs, SIZE - 1, 1)
    if SIZE >= 4:
        runs = runs_of(runs, SIZE - 3, 2)
    if SIZE >= 8:
        runs = runs_of(runs, SIZE - 7, 4)
    return runs[0] if SIZE == 1 else largest(runs[0], runs[-1])


@triton.jit
def chosen_around(
    row, valid, CENTER: tl.constexpr, RADIUS: tl.constexpr, CAREFUL: tl.constexpr = True
):
    """Which of these is the maximum, as a chain of choices that begins at the center.

    Args:
        row: elements; beyond the map they are -Inf.
        valid: whether each of those before the center is on the map; empty if all of them are.
        CAREFUL: whether there may be NaN, or windows of nothing but -Inf.

    Returns:
        The maximum and, for each distance from the center, whether the element so far before it
        loses to all that are nearer, and whether the one so far after it wins.
    """
    top = row[CENTER]
    keeps = ()
    moves = ()
    for d in tl.static_range(1, RADIUS + 1):
        before, after = row[CENTER - d], row[CENTER + d]
        # Of equal elements the first is the maximum, unless it is beyond the map.
        keep = right_wins(before, top, CAREFUL)
        if CAREFUL and len(valid) > 0:
            keep = keep | (valid[CENTER - d] == 0)
        keeps = keeps + (keep,)
        top = largest(before, top)
        moves = moves + (right_wins(top, after, CAREFUL),)
        top = largest(top, after)
    return top, keeps, moves


@triton.jit
def picked_around(codes, keeps, moves, CENTER: tl.constexpr):
    """What stands where the maximum does: a number, or an element of another map."""
    code = codes[CENTER]
    for i in tl.static_range(len(keeps)):
        code = tl.where(keeps[i], code, codes[CENTER - 1 - i])
        code = tl.where(moves[i], codes[CENTER + 1 + i], code)
    return code


@triton.jit
def added_around(sums, grad, keeps, moves, CENTER: tl.constexpr):
    """A tuple of sums, to that of which the gradient is added where the maximum stands."""
    RADIUS: tl.constexpr = len(keeps)
    before = ()
    after = ()
    for d in tl.static_range(RADIUS, 0, -1):
        after = (sums[CENTER + d] + tl.where(moves[d - 1], grad, 0.0),) + after
        grad = tl.where(moves[d - 1], 0.0, grad)
        before = before + (sums[CENTER - d] + tl.where(keeps[d - 1], 0.0, grad),)
        grad = tl.where(keeps[d - 1], grad, 0.0)
    around = before + (sums[CENTER] + grad,) + after
    return sums[: CENTER - RADIUS] + around + sums[CENTER + RADIUS + 1 :]


@triton.jit
def added_to_first(sums, grad, ring, top, CENTER: tl.constexpr, RADIUS: tl.constexpr):
    """The same, where the gradient goes to the first element that equals the maximum."""
    around = ()
    for i in tl.static_range(2 * RADIUS + 1):
        total = sums[CENTER - RADIUS + i]
        hit = ring[CENTER - RADIUS + i] == top
        around = around + (tl.where(hit, total + grad, total),)
        top = tl.where(hit, float("nan"), top)  # nothing equals it any more
    return sums[: CENTER - RADIUS] + around + sums[CENTER + RADIUS + 1 :]


@triton.jit
def packed(keeps, moves, shape: tl.constexpr):
    """Choices as a number: for each distance from the center three bits, of which one is set."""
    code = tl.zeros(shape, tl.int32)
    for i in tl.static_range(len(keeps)):
        code |= tl.where(moves[i], 2 << (3 * i), tl.where(keeps[i], 4 << (3 * i), 1 << (3 * i)))
    return code


@triton.jit
def unpacked(code, RADIUS: tl.constexpr):
    """Whether a maximum is before the center, behind it or nearer, for each distance."""
    before = ()
    behind = ()
    nearer = ()
    for i in tl.static_range(RADIUS):
        before = before + ((code & (6 << (3 * i))) == 0,)
        behind = behind + ((code & (5 << (3 * i))) == 0,)
        nearer = nearer + ((code & (3 << (3 * i))) == 0,)
    return before, behind, nearer
