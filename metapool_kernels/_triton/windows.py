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
def pushed(ring, item):
    """The ring without its oldest item, and with a new one."""
    return ring[1:] + (item,)


@triton.jit
def right_wins(left, right):
    """Whether ``right``, which comes later in the window, is the maximum of the two."""
    return (right > left) | (right != right)


@triton.jit
def largest(left, right):
    """The maximum where it does not matter which of equal elements it is."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sum_around(row, CENTER: tl.constexpr, RADIUS: tl.constexpr):
    """Sum of ``row[CENTER - RADIUS]`` to ``row[CENTER + RADIUS]``; a wider one shares a narrower."""
    total = row[CENTER]
    for d in tl.static_range(1, RADIUS + 1):
        total += row[CENTER - d] + row[CENTER + d]
    return total


@triton.jit
def largest_around(row, CENTER: tl.constexpr, RADIUS: tl.constexpr):
    """Maximum of ``row[CENTER - RADIUS]`` to ``row[CENTER + RADIUS]``."""
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
def select_around(row, codes, valid, CENTER: tl.constexpr, RADIUS: tl.constexpr):
    """The maximum, and the code that stands where it does.

    Args:
        row: elements; beyond the map they are -Inf.
        codes: what to return for each of them: a number, or an element of another map.
        valid: whether each of them is inside the map.
    """
    top, code = row[CENTER], codes[CENTER]
    for d in tl.static_range(1, RADIUS + 1):
        before, after = row[CENTER - d], row[CENTER + d]
        # An element that comes first is the maximum of equal ones, unless it is beyond the map.
        keeps = right_wins(before, top) | (valid[CENTER - d] == 0)
        code = tl.where(keeps, code, codes[CENTER - d])
        top = tl.where(keeps, top, before)
        moves = right_wins(top, after)
        code = tl.where(moves, codes[CENTER + d], code)
        top = tl.where(moves, after, top)
    return top, code
