"""What a lane stands for, and how it reads and writes maps and weights.

A lane holds neighbouring columns of one plane: a tuple with one tensor of lanes for each. So what
columns share is computed once, and a lane can read and write them as one vector.
"""

import triton
import triton.language as tl


@triton.jit
def locate(lane, groups, channels, CHANNELS_LAST: tl.constexpr):
    """Image, channel and group of columns of a lane; neighbouring lanes are so in memory."""
    if CHANNELS_LAST:
        image = lane // channels // groups
        channel = lane % channels
        group = lane // channels % groups
    else:
        image = lane // groups // channels
        channel = lane // groups % channels
        group = lane % groups
    return image.to(tl.int64), channel.to(tl.int64), group


@triton.jit
def first_of(map, image, channel):
    """Where the planes of lanes begin."""
    return image * map.stride_n + channel * map.stride_c


@triton.jit
def load_weights(weights, image, channel, in_lanes, SHARED: tl.constexpr, COUNT: tl.constexpr):
    """A tuple of the COUNT weights of each lane's plane, scalars where all planes share them."""
    loaded = ()
    step = tl.cast(weights.stride_k, tl.int64)
    for k in tl.static_range(COUNT):
        if SHARED:
            weight = tl.load(weights.data + k * step)
        else:
            at = image * weights.stride_n + channel * weights.stride_c + k * step
            weight = tl.load(weights.data + at, mask=in_lanes, other=0)
        loaded = loaded + (weight,)
    return loaded


@triton.jit
def weights_of(weights, POOLS: tl.constexpr, OVER_AREA: tl.constexpr):
    """The weights of these poolings, divided by their areas if OVER_AREA."""
    chosen = ()
    for p in tl.static_range(len(POOLS)):
        weight = weights[POOLS[p][2]]
        if OVER_AREA:
            weight /= (2 * POOLS[p][0] + 1) * (2 * POOLS[p][1] + 1)
        chosen = chosen + (weight,)
    return chosen


@triton.jit
def columns_of(block):
    """The columns of a block of shape (lanes, columns), as a tuple."""
    COLUMNS: tl.constexpr = block.shape[1]
    if COLUMNS == 1:
        columns = (tl.reshape(block, (block.shape[0],)),)
    else:
        even, odd = tl.split(tl.reshape(block, (block.shape[0], COLUMNS // 2, 2)))
        evens = columns_of(even)
        odds = columns_of(odd)
        columns = ()
        for i in tl.static_range(COLUMNS // 2):
            columns = columns + (evens[i], odds[i])
    return columns


@triton.jit
def block_of(columns):
    """Undoes :func:`columns_of`."""
    COLUMNS: tl.constexpr = len(columns)
    if COLUMNS == 1:
        block = tl.expand_dims(columns[0], 1)
    else:
        block = tl.join(block_of(columns[0::2]), block_of(columns[1::2]))
        block = tl.reshape(block, (block.shape[0], COLUMNS))
    return block


@triton.jit
def inside_row(group, w, in_lanes, COLUMNS: tl.constexpr, RADIUS: tl.constexpr):
    """Whether a lane's columns, and RADIUS more on each side, are on the map."""
    inside = ()
    for i in tl.static_range(COLUMNS + 2 * RADIUS):
        at = group * COLUMNS + (i - RADIUS)
        inside = inside + (in_lanes & (at >= 0) & (at < w),)
    return inside


@triton.jit
def load_row(
    map, plane, row, group, inside,
    COLUMNS: tl.constexpr, RADIUS: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
    OTHER: tl.constexpr = 0,
):  # fmt: skip
    """A lane's columns of a row, and RADIUS more on each side, as a tuple.

    OTHER stands for pixels that are not ``inside``.
    """
    pixels = ()
    start = plane + tl.cast(row, tl.int64) * map.stride_h
    if VECTOR:
        HALO: tl.constexpr = (RADIUS + COLUMNS - 1) // COLUMNS
        # Written as a multiple of COLUMNS, from which follows that the address is aligned.
        lane = ((start + group) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
        lane = map.data + lane
        for i in tl.static_range(2 * HALO + 1):
            at = lane + (i - HALO) * COLUMNS
            mask = inside[_clamp((i - HALO) * COLUMNS + RADIUS, len(inside))]
            block = tl.load(at, mask=mask[:, None], other=OTHER)
            pixels = pixels + columns_of(block.to(ACC))
        pixels = pixels[HALO * COLUMNS - RADIUS : (HALO + 1) * COLUMNS + RADIUS]
    else:
        step = tl.cast(map.stride_w, tl.int64)
        start += (group * COLUMNS) * step
        for i in tl.static_range(COLUMNS + 2 * RADIUS):
            at = map.data + start + (i - RADIUS) * step
            pixels = pixels + (tl.load(at, mask=inside[i], other=OTHER).to(ACC),)
    return pixels


@triton.jit
def load_rows(
    x, values, x_plane, values_plane, row, group, inside,
    COLUMNS: tl.constexpr, RADIUS: tl.constexpr, HAS_MAX: tl.constexpr, HAS_VALUES: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What sums take of a row, and what maxima compare: -Inf where not ``inside``."""
    pooled = load_row(values, values_plane, row, group, inside, COLUMNS, RADIUS, VECTOR, ACC)
    compared = pooled
    if HAS_MAX:
        if HAS_VALUES:
            compared = load_row(x, x_plane, row, group, inside, COLUMNS, RADIUS, VECTOR, ACC)
        filled = ()
        for i in tl.static_range(len(compared)):
            filled = filled + (tl.where(inside[i], compared[i], float("-inf")),)
        compared = filled
    return pooled, compared


@triton.constexpr_function
def _clamp(i, length):
    return min(max(i, 0), length - 1)


@triton.jit
def store_row(map, plane, row, group, columns, w, mask, VECTOR: tl.constexpr):
    """Write a lane's columns to a row, each rounded once."""
    COLUMNS: tl.constexpr = len(columns)
    start = plane + tl.cast(row, tl.int64) * map.stride_h
    if VECTOR:
        at = ((start + group) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
        block = block_of(columns).to(map.data.dtype.element_ty)
        tl.store(map.data + at, block, mask=mask[:, None])
    else:
        for v in tl.static_range(COLUMNS):
            column = group * COLUMNS + v
            at = map.data + start + column.to(tl.int64) * map.stride_w
            pixel = columns[v].to(map.data.dtype.element_ty)
            tl.store(at, pixel, mask=mask & (column < w))


@triton.jit
def window_size(center, size, RADIUS: tl.constexpr):
    """How many pixels of a window around ``center`` are on a map of ``size`` rows or columns."""
    return tl.minimum(center + RADIUS + 1, size) - tl.maximum(center - RADIUS, 0)
