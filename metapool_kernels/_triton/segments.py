"""What the 32 lanes of a segment, one warp or half a wave of 64, hand to each other.

The gradient of a maximum belongs to the column where it stands, which may be another lane's; the
gradient of the weights is added up over the lanes of a plane.
"""

import triton
import triton.language as tl

from metapool_kernels._triton.plan import SEGMENT
from metapool_kernels._triton.windows import repeated, unpacked

LANES: tl.constexpr = tl.constexpr(SEGMENT)
"""Lanes of a segment, as kernels take it."""


@triton.jit
def _from_lane(block, DELTA: tl.constexpr):
    """What the lane DELTA further in the segment holds, around its end."""
    SEGMENTS: tl.constexpr = block.shape[0] // LANES
    lane = (tl.arange(0, LANES) + (DELTA + LANES)) % LANES
    lane = tl.broadcast_to(lane[None, :], (SEGMENTS, LANES))
    block = tl.gather(tl.reshape(block, (SEGMENTS, LANES)), lane, 1)
    return tl.reshape(block, (SEGMENTS * LANES,))


@triton.jit
def _added(values, value, AT: tl.constexpr):
    """A tuple with a value added to one of its own, if it has that one."""
    if AT >= 0 and len(values) > AT:
        values = values[:AT] + (values[AT] + value,) + values[AT + 1 :]
    return values


@triton.constexpr_function
def widest(pools):
    """The largest radius along the row, 0 where there are no poolings."""
    return max((pool[1] for pool in pools), default=0)


@triton.jit
def _add_to_columns(
    given, pending, code, CENTER: tl.constexpr, RADIUS: tl.constexpr, MAX: tl.constexpr
):
    """Adds the oldest gradients of one column's maxima to the columns where these stand.

    Where a maximum is not near the ends of its window, it is that of the narrower window too.
    """
    before, behind, nearer = unpacked(code, RADIUS)
    grad = -0.0
    for d in tl.static_range(RADIUS, 0, -1):
        for p in tl.static_range(len(MAX)):
            if MAX[p][1] == d:
                grad += pending[p][0]
        given = _added(given, tl.where(before[d - 1], grad, 0.0), CENTER - d)
        given = _added(given, tl.where(behind[d - 1], grad, 0.0), CENTER + d)
        grad = tl.where(nearer[d - 1], grad, 0.0)
    for p in tl.static_range(len(MAX)):
        if MAX[p][1] == 0:
            grad += pending[p][0]
    return _added(given, grad, CENTER)


@triton.jit
def _add_along(given, waiting, CENTER: tl.constexpr, RADIUS: tl.constexpr, AVG: tl.constexpr):
    """Adds what averages of one column's windows have sent to the columns that they hold."""
    grad = -0.0
    for d in tl.static_range(RADIUS, 0, -1):
        for p in tl.static_range(len(AVG)):
            if AVG[p][1] == d:
                grad += waiting[p][0]
        given = _added(given, grad, CENTER - d)
        given = _added(given, grad, CENTER + d)
    for p in tl.static_range(len(AVG)):
        if AVG[p][1] == 0:
            grad += waiting[p][0]
    return _added(given, grad, CENTER)


@triton.jit
def gradients_of_row(
    dues, kepts, in_segment, group, w, nothing,
    AVG: tl.constexpr, MAX: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """The gradients of the oldest row.

    AVG holds averages whose gradients wait; those of others are ready where they belong.
    """
    COLUMNS: tl.constexpr = len(dues)
    HANDED: tl.constexpr = max(widest(MAX), widest(AVG))
    # What the windows of this row's columns give to each of the lane's columns and its neighbours'.
    given = repeated(nothing, COLUMNS + 2 * HANDED)
    for v in tl.static_range(COLUMNS):
        _, _, codes, _ = kepts[v]
        pending, ready = dues[v]
        if len(MAX) > 0:
            given = _add_to_columns(given, pending, codes[0], HANDED + v, widest(MAX), MAX)
        if len(AVG) > 0:
            given = _add_along(given, ready, HANDED + v, widest(AVG), AVG)
    row = ()
    for v in tl.static_range(COLUMNS):
        _, ready = dues[v]
        grad = given[v + HANDED]
        if len(AVG) == 0 and len(ready) > 0:
            grad += ready[0][0]
        for lanes in tl.static_range(1, (HANDED + COLUMNS - 1) // COLUMNS + 1):
            if v + lanes * COLUMNS < COLUMNS + HANDED:
                handed = _from_lane(given[v + lanes * COLUMNS + HANDED], -lanes)
                if TILED:
                    handed = tl.where(in_segment >= lanes, handed, 0.0)
                if len(AVG) > 0:  # whose windows reach over the end of the map, to other planes
                    handed = tl.where(group >= lanes, handed, 0.0)
                grad += handed
            if v - lanes * COLUMNS >= -HANDED:
                handed = _from_lane(given[v - lanes * COLUMNS + HANDED], lanes)
                if TILED:
                    handed = tl.where(in_segment < LANES - lanes, handed, 0.0)
                if len(AVG) > 0:
                    handed = tl.where((group + lanes) * COLUMNS < w, handed, 0.0)
                grad += handed
        row = row + (grad,)
    return row


@triton.jit
def store_total(total, at, first, index, groups, ROUNDS: tl.constexpr):
    """Adds up a total over the lanes of each plane, in a fixed order, and writes it."""
    for i in tl.static_range(ROUNDS):
        handed = _from_lane(total, 2**i)
        total += tl.where(index + 2**i < groups, handed, 0.0)
    tl.store(at, total, mask=first)
