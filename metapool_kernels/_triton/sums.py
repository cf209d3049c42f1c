"""The terms that lanes have written, put together for each plane and candidate in float64."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["planes", "channels", "groups", "strips", "size"],
)  # fmt: skip
def meta_pool_sums_kernel(
    terms,
    out,
    planes,
    channels,
    groups,
    strips,
    size,
    FORM: tl.constexpr,
    COUNT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Writes two sums of each plane and candidate, of shape (planes, COUNT, 2).

    Of moments, taken over ``size`` values: their mean and the sum of squared deviations from it. Of
    products: the sum of the other map and that of products. ``terms`` are as
    :func:`metapool_kernels._triton.forms.store_terms` leaves them.
    """
    EACH: tl.constexpr = 3 if FORM == "moments" else 1
    pid = tl.program_id(0)
    k = pid % COUNT
    plane = (pid // COUNT).to(tl.int64) * PLANES + tl.arange(0, PLANES)
    in_planes = plane < planes
    if CHANNELS_LAST:
        lane = plane // channels * channels * groups + plane % channels
        step = tl.cast(channels, tl.int64)
    else:
        lane = plane * groups
        step = tl.cast(1, tl.int64)
    lanes = tl.cast(planes, tl.int64) * groups
    own = lanes * (1 + k * EACH)
    base = tl.load(terms + lane + own, mask=in_planes, other=0).to(tl.float64)[:, None]
    first = tl.zeros((PLANES, GROUPS), tl.float64)
    second = tl.zeros((PLANES, GROUPS), tl.float64)
    for strip in range(strips):
        for begin in range(0, groups, GROUPS):
            group = begin + tl.arange(0, GROUPS)
            at = (
                terms + lanes * (strip * (1 + COUNT * EACH)) + lane[:, None] + group[None, :] * step
            )
            mask = in_planes[:, None] & (group < groups)[None, :]
            shared = tl.load(at, mask=mask, other=0).to(tl.float64)
            mine = tl.load(at + own, mask=mask, other=0).to(tl.float64)
            if FORM == "moments":
                total = tl.load(at + own + lanes, mask=mask, other=0).to(tl.float64)
                squares = tl.load(at + own + 2 * lanes, mask=mask, other=0).to(tl.float64)
                # From deviations from the lane's first value to those from the plane's.
                apart = tl.where(mask, mine - base, 0.0)
                first += total + shared * apart
                second += squares + apart * (2 * total + shared * apart)
            else:
                first += shared
                second += mine
    first = tl.sum(first, 1)
    second = tl.sum(second, 1)
    if FORM == "moments":
        mean = first / size
        second = tl.maximum(second - mean * first, 0.0, propagate_nan=tl.PropagateNan.ALL)
        first = tl.reshape(base, (PLANES,)) + mean
    at = out + (plane * COUNT + k) * 2
    tl.store(at, first, mask=in_planes)
    tl.store(at + 1, second, mask=in_planes)
