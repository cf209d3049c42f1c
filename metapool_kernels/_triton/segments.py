"""What the 32 lanes of a segment, one warp, hand to each other.

The gradient of a maximum belongs to the column where it stands, which may be another lane's; the
gradient of the weights is added up over the lanes of a plane.
"""

import triton
import triton.language as tl

from metapool_kernels._triton.plan import SEGMENT
from metapool_kernels._triton.windows import repeated

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


@triton.constexpr_function
def _by_width(pools):
    """The widest first: its number, its radius, and from which distance on it is alone."""
    order = sorted(range(len(pools)), key=lambda p: -pools[p][1])
    radii = [pools[p][1] for p in order]
    inner = [radius + 1 for radius in radii[1:]] + [0] * (len(radii) > 0)
    return tuple(zip(order, radii, inner, strict=True))


@triton.jit
def _added(values, value, AT: tl.constexpr):
    """A tuple with a value added to one of its own, if it has that one."""
    if AT >= 0 and len(values) > AT:
        values = values[:AT] + (values[AT] + value,) + values[AT + 1 :]
    return values


@triton.jit
def _add_to_outer(
    given, grad, code, CENTER: tl.constexpr, INNER: tl.constexpr, RADIUS: tl.constexpr
):
    """Adds a gradient where ``code`` says, if it is INNER to RADIUS columns from the center."""
    inner = grad
    for d in tl.static_range(INNER, RADIUS + 1):
        is_before = code == -d
        is_after = code == d
        if d > 0:
            given = _added(given, tl.where(is_before, grad, 0.0), CENTER - d)
            inner = tl.where(is_before | is_after, 0.0, inner)
        given = _added(given, tl.where(is_after, grad, 0.0), CENTER + d)
    return given, inner


@triton.jit
def _add_to_columns(given, pending, codes, CENTER: tl.constexpr, MAX: tl.constexpr):
    """Adds the oldest gradients of one column's maxima to the columns where these stand.

    Where a maximum is not near the ends of its window, it is that of the narrower window too.
    """
    ORDER: tl.constexpr = _by_width(MAX)
    inner = 0.0
    for i in tl.static_range(len(ORDER)):
        grad = pending[ORDER[i][0]][0]
        if i > 0:
            grad += inner
        code = codes[ORDER[i][0]][0]
        given, inner = _add_to_outer(given, grad, code, CENTER, ORDER[i][2], ORDER[i][1])
    return given


@triton.jit
def gradients_of_row(
    dues, kepts, in_segment, MAX: tl.constexpr, RADIUS: tl.constexpr,
    TILED: tl.constexpr,
):  # fmt: skip
    """The gradients of the oldest row."""
    COLUMNS: tl.constexpr = len(dues)
    HANDED: tl.constexpr = RADIUS if len(MAX) > 0 else 0
    nothing = tl.full(in_segment.shape, -0.0, dues[0][1][0].dtype)
    # What the maxima of this row give to each of the lane's columns and to its neighbours'.
    given = repeated(nothing, COLUMNS + 2 * HANDED)
    for v in tl.static_range(COLUMNS):
        _, _, codes, _ = kepts[v]
        pending, _ = dues[v]
        given = _add_to_columns(given, pending, codes, HANDED + v, MAX)
    row = ()
    for v in tl.static_range(COLUMNS):
        _, ready = dues[v]
        grad = ready[0] + given[v + HANDED]
        for lanes in tl.static_range(1, (HANDED + COLUMNS - 1) // COLUMNS + 1):
            if v + lanes * COLUMNS < COLUMNS + HANDED:
                handed = _from_lane(given[v + lanes * COLUMNS + HANDED], -lanes)
                if TILED:
                    handed = tl.where(in_segment >= lanes, handed, 0.0)
                grad += handed
            if v - lanes * COLUMNS >= -HANDED:
                handed = _from_lane(given[v - lanes * COLUMNS + HANDED], lanes)
                if TILED:
                    handed = tl.where(in_segment < LANES - lanes, handed, 0.0)
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
