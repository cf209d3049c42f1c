"""How a call is cut into programs: the only place that chooses, from what is known before it runs.

A call falls into a :class:`Regime`. For each there are a few configurations that are worth trying,
the first of them the default; ``METAPOOL_AUTOTUNE=1`` measures them all (:mod:`.autotune`).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from metapool_kernels.candidates import Candidate, Kind
from metapool_kernels.layout import output_size
from metapool_kernels.spec import PoolSpec

SEGMENT = 32
"""Lanes that can hand each other what they hold: those of a warp, or half a wave of 64."""

LOW = 14
"""Up to so many rows a kernel is compiled for the number of them."""

LOW_WITH_MAX = 8
"""The same of gradients of maxima, whose kernels are longer."""

ALL_ROWS = 0
"""Stands for that number in a configuration."""

ENOUGH_PROGRAMS = 264
"""Maps are cut into strips of rows until there are so many programs: two for each processor."""

Pool = tuple[int, int, int]
"""Radius down and along, and which candidate it is."""


class Pools(NamedTuple):
    """Candidates by what they compute: compile-time constants of every kernel."""

    avg: tuple[Pool, ...]
    max: tuple[Pool, ...]
    none: tuple[int, ...]
    radius_h: int
    radius_w: int


@lru_cache(maxsize=256)
def pools_of(codes: tuple[int, ...]) -> Pools:
    """Sort candidates, given by :attr:`metapool_kernels.candidates.Candidate.code`, by kind."""
    candidates = [Candidate.from_code(code) for code in codes]

    def of(*kinds: Kind) -> tuple[Pool, ...]:
        """The highest first."""
        pools = ((c.kh // 2, c.kw // 2, k) for k, c in enumerate(candidates) if c.kind in kinds)
        return tuple(sorted(pools, reverse=True))

    return Pools(
        of(Kind.AVG, Kind.SKIP),
        of(Kind.MAX),
        tuple(k for _, _, k in of(Kind.NONE)),
        max(c.kh // 2 for c in candidates),
        max(c.kw // 2 for c in candidates),
    )


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """In what the sums are kept."""
    return tl.float64 if dtype is torch.float64 else tl.float32


class Config(NamedTuple):
    """What can be tuned: columns to a lane, rows to a step of the loop, warps of SEGMENT lanes to a
    program.
    """

    columns: int
    unroll: int
    num_warps: int


class Regime(NamedTuple):
    """What a configuration depends on; coarse, so that new sizes and candidates fall into it."""

    backward: bool
    has_max: bool
    is_heavy: bool
    """Large windows, steps along the row, float64 or, backward, maxima of one map that pick values
    of another: one column is all that registers hold."""
    is_low: bool
    is_wide: bool
    """Backward, whether a plane is too wide for two columns to a lane of one segment."""
    vector: int
    """Columns that can be read as one vector: 4, 2 or 1; 0 with channels last."""
    form: str = "mix"
    """See :mod:`.forms` and :mod:`.sent`. In others than a mixture each pooling is kept by itself,
    some of them in sums, and so is what each of them sends back."""


_LOW_FORWARD = {
    4: (Config(4, ALL_ROWS, 4), Config(2, ALL_ROWS, 4)),
    2: (Config(2, ALL_ROWS, 4), Config(1, ALL_ROWS, 4)),
    1: (Config(4, ALL_ROWS, 4), Config(2, ALL_ROWS, 4), Config(1, ALL_ROWS, 4)),
    0: (Config(4, ALL_ROWS, 4), Config(2, ALL_ROWS, 4)),
}
_FORWARD = {
    4: (Config(4, 4, 4), Config(4, 2, 4), Config(2, 7, 4)),
    2: (Config(2, 7, 4), Config(2, 4, 4), Config(1, 7, 4)),
    1: (Config(1, 7, 4), Config(4, 4, 4), Config(1, 4, 8)),
    0: (Config(4, 4, 4), Config(2, 7, 4)),
}
_LOW_BACKWARD = {
    **dict.fromkeys((4, 2, 1), (Config(2, ALL_ROWS, 4), Config(1, ALL_ROWS, 4))),
    0: (Config(1, ALL_ROWS, 4), Config(1, ALL_ROWS, 8)),
}
_BACKWARD = {
    **dict.fromkeys((4, 2, 1), (Config(2, 4, 4), Config(2, 2, 4), Config(1, 4, 4))),
    0: (Config(2, 2, 4), Config(1, 2, 4)),
}
_WIDE_BACKWARD = (Config(2, 2, 4), Config(1, 4, 4))
_LOW_BACKWARD_AVG = {
    4: (Config(4, ALL_ROWS, 4), Config(2, ALL_ROWS, 4)),
    2: (Config(2, ALL_ROWS, 4), Config(1, ALL_ROWS, 4)),
    1: (Config(4, ALL_ROWS, 4), Config(2, ALL_ROWS, 4)),
    0: (Config(2, ALL_ROWS, 4), Config(1, ALL_ROWS, 4)),
}
_BACKWARD_AVG = {
    4: (Config(4, 2, 4), Config(4, 4, 4)),
    2: (Config(2, 4, 4), Config(1, 7, 4)),
    1: (Config(2, 4, 4), Config(1, 7, 4)),
    0: (Config(2, 4, 4), Config(1, 7, 4)),
}
_LOW_TERMS = (Config(2, ALL_ROWS, 4), Config(1, ALL_ROWS, 4))
_TERMS = (Config(2, 2, 4), Config(2, 4, 4), Config(4, 2, 4))
_LOW_BACKWARD_EACH = (Config(1, ALL_ROWS, 4), Config(2, ALL_ROWS, 4))
_BACKWARD_STACK = (Config(2, 2, 4), Config(1, 2, 4))
_BACKWARD_EACH = (Config(1, 4, 4), Config(1, 2, 4))
_LOW_BACKWARD_FIELDS_AVG = (Config(2, ALL_ROWS, 4), Config(1, ALL_ROWS, 4))
_BACKWARD_FIELDS_AVG = (Config(2, 4, 4), Config(2, 2, 4), Config(4, 2, 4))
_HEAVY = (Config(1, 1, 4), Config(1, 2, 4))
_HEAVY_EACH = (Config(1, 2, 4), Config(1, 1, 4))


def configs(regime: Regime) -> tuple[Config, ...]:
    """The configurations of a regime, the default first."""
    if regime.is_heavy:
        return _HEAVY if regime.form == "mix" else _HEAVY_EACH
    if regime.form in ("moments", "products"):
        return _LOW_TERMS if regime.is_low else _TERMS
    if not regime.backward:
        return (_LOW_FORWARD if regime.is_low else _FORWARD)[regime.vector]
    if regime.form != "mix" and regime.has_max:
        if regime.is_low:
            return _LOW_BACKWARD_EACH
        return _BACKWARD_STACK if regime.form == "stack" and regime.vector else _BACKWARD_EACH
    if regime.form == "fields":
        return _LOW_BACKWARD_FIELDS_AVG if regime.is_low else _BACKWARD_FIELDS_AVG
    if not regime.has_max:
        return (_LOW_BACKWARD_AVG if regime.is_low else _BACKWARD_AVG)[regime.vector]
    if regime.is_wide:
        return _WIDE_BACKWARD
    return (_LOW_BACKWARD if regime.is_low else _BACKWARD)[regime.vector]


class Layout(NamedTuple):
    """How a map of shape (N, C, H, W) lies in memory, on which plans depend."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Bytes from an address that is a multiple of 32."""


def layout_of(x: Tensor) -> Layout:
    """The layout of a tensor."""
    return Layout(x.shape, x.stride(), x.dtype, x.data_ptr() % 32)


@lru_cache(maxsize=4096)
def regime_of(
    maps: tuple[Layout, ...],
    spec: PoolSpec,
    *,
    backward: bool,
    has_values: bool,
    form: str = "mix",
) -> Regime:
    """The regime of a call on these maps, the input first."""
    pools = pools_of(spec.candidates)
    has_steps = spec.stride[1] != 1
    has_large_windows = max(pools.radius_h, pools.radius_w) > 3
    is_careful = backward and bool(pools.max) and has_values
    is_heavy = has_large_windows or has_steps or is_careful or maps[0].dtype is torch.float64
    vector = next(v for v in (4, 2, 1) if v == 1 or all(_has_vectors(x, v) for x in maps))
    lowest = LOW_WITH_MAX if backward and pools.max else LOW
    return Regime(
        backward,
        bool(pools.max),
        is_heavy,
        maps[0].shape[2] <= lowest and not has_steps,
        backward and maps[0].shape[3] > 2 * SEGMENT,
        0 if spec.channels_last else vector,
        form,
    )


def _has_vectors(x: Layout, columns: int) -> bool:
    """Whether rows consist of vectors of so many elements, all of them aligned."""
    *outer, last = x.stride
    aligned = x.offset % (columns * x.dtype.itemsize) == 0 and x.shape[3] % columns == 0
    return aligned and last == 1 and not any(stride % columns for stride in outer)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Strips(NamedTuple):
    """How the rows are cut."""

    number: int
    rows: int


def _strips(blocks: int, rows: int, pools: Pools, unroll: int) -> Strips:
    """As many strips as give enough programs, none so low that its halo costs more than itself."""
    lowest = max(unroll, 4 * pools.radius_h)
    count = max(1, min(_ceil_div(ENOUGH_PROGRAMS, blocks), rows // lowest))
    height = _ceil_div(_ceil_div(rows, count), unroll) * unroll
    return Strips(_ceil_div(rows, height), height)


class Tile(NamedTuple):
    """What the kernels need to know of a cut."""

    config: Config
    unroll: int
    vector: int
    """Elements that are read and written at once: a multiple of it is every stride."""
    is_low: bool
    """Whether one round of the loop does all rows, so that it can be compiled for their number."""
    groups: int
    strips: Strips
    programs: int


@lru_cache(maxsize=4096)
def forward_tile(maps: tuple[Layout, ...], spec: PoolSpec, config: Config) -> Tile:
    """Programs for the outputs of the first of ``maps``."""
    n, c, *size = maps[0].shape
    rows, w = output_size((size[0], size[1]), spec.stride)
    groups = _ceil_div(w, config.columns)
    blocks = _ceil_div(n * c * groups, SEGMENT * config.num_warps)
    return _tile(maps, spec, config, groups, rows, blocks)


def _tile(
    maps: tuple[Layout, ...],
    spec: PoolSpec,
    config: Config,
    groups: int,
    rows: int,
    blocks: int,
) -> Tile:
    unroll = rows if config.unroll == ALL_ROWS else config.unroll
    strips = _strips(blocks, rows, pools_of(spec.candidates), unroll)
    has_vectors = spec.stride[1] == 1 and all(_has_vectors(x, config.columns) for x in maps)
    return Tile(
        config,
        unroll,
        config.columns if has_vectors else 1,
        strips.number == 1 and strips.rows == unroll and maps[0].shape[2] <= LOW,
        groups,
        strips,
        blocks * strips.number,
    )


class Segments(NamedTuple):
    """How planes lie in the segments of backward: several to one, or one in overlapping tiles."""

    planes: int
    tiles: int
    rounds: int
    """Rounds of adding neighbours that add up the lanes of a plane."""


@lru_cache(maxsize=4096)
def backward_tile(
    maps: tuple[Layout, ...], spec: PoolSpec, config: Config
) -> tuple[Tile, Segments]:
    """Programs for the gradients of a map of the shape of the first of ``maps``."""
    n, c, rows, w = maps[0].shape
    groups = _ceil_div(w, config.columns)
    planes, tiles = 1, 1
    if groups <= SEGMENT:
        planes = SEGMENT // groups
    else:
        halo = _ceil_div(pools_of(spec.candidates).radius_w, config.columns)
        tiles = _ceil_div(groups - 2 * halo, SEGMENT - 2 * halo)
    blocks = _ceil_div(_ceil_div(n * c, planes), config.num_warps) * tiles
    tile = _tile(maps, spec, config, groups, rows, blocks)
    return tile, Segments(planes, tiles, (min(groups, SEGMENT) - 1).bit_length())
