"""How a call is cut into programs, from what is known before it runs."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from metapool_kernels.candidates import Candidate, Kind
from metapool_kernels.ops import PoolSpec

Pool = tuple[int, int, tuple[int, ...]]
"""Radius down and along, and the positions of the candidates that are this pooling."""


class Pools(NamedTuple):
    """Candidates by what they compute: compile-time constants of every kernel."""

    avg: tuple[Pool, ...]
    max: tuple[Pool, ...]
    none: tuple[int, ...]
    radius_h: int
    radius_w: int


@lru_cache(maxsize=256)
def pools_of(codes: tuple[int, ...]) -> Pools:
    """Group candidates, given by :attr:`metapool_kernels.candidates.Candidate.code`."""
    positions: dict[tuple[Kind, int, int], list[int]] = {}
    none = []
    for k, code in enumerate(codes):
        candidate = Candidate.from_code(code)
        if candidate.kind is Kind.NONE:
            none.append(k)
            continue
        kind = Kind.AVG if candidate.kind is Kind.SKIP else candidate.kind
        positions.setdefault((kind, candidate.kh // 2, candidate.kw // 2), []).append(k)

    def of(kind: Kind) -> tuple[Pool, ...]:
        pools = ((rh, rw, tuple(ks)) for (k, rh, rw), ks in positions.items() if k is kind)
        return tuple(sorted(pools, reverse=True))

    radius_h = max((rh for _, rh, _ in positions), default=0)
    radius_w = max((rw for _, _, rw in positions), default=0)
    return Pools(of(Kind.AVG), of(Kind.MAX), tuple(none), radius_h, radius_w)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """In what the sums are kept."""
    return tl.float64 if dtype is torch.float64 else tl.float32


SEGMENT = 32
"""Lanes that can hand each other what they hold: those of a warp."""


class Tile(NamedTuple):
    """What one program does: ``block`` lanes of ``columns`` columns over ``strip_rows`` rows."""

    block: int
    blocks: int
    columns: int
    vector: bool
    groups: int
    lanes: int
    strip_rows: int
    strips: int
    unroll: int
    num_warps: int


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _columns(maps: tuple[Tensor, ...], spec: PoolSpec) -> tuple[int, bool]:
    """Columns to a lane, and whether they can be read and written as one vector."""
    w = maps[0].shape[3]
    rows_are_dense = all(x.stride(3) == 1 for x in maps)
    if spec.stride[1] != 1:
        return 1, False
    if w <= 8 and (spec.channels_last or rows_are_dense):
        return w, rows_are_dense and w > 1
    if spec.channels_last:
        return 4, False
    columns = 4
    while columns > 1 and not all(_has_vectors(x, columns) for x in maps):
        columns //= 2
    return columns, columns > 1


def _has_vectors(x: Tensor, columns: int) -> bool:
    *outer, w = x.stride()
    aligned = x.data_ptr() % (columns * x.element_size()) == 0 and x.shape[3] % columns == 0
    return aligned and w == 1 and not any(stride % columns for stride in outer)


def forward_tile(maps: tuple[Tensor, ...], spec: PoolSpec, pools: Pools) -> Tile:
    """Programs for an output of the shape of the last of ``maps``."""
    n, c, rows, w = maps[-1].shape
    columns, vector = _columns(maps, spec)
    groups = _ceil_div(w, columns)
    lanes = n * c * groups
    block = 128
    unroll = 4
    strip_rows = _ceil_div(rows, unroll) * unroll
    return Tile(
        block,
        _ceil_div(lanes, block),
        columns,
        vector,
        groups,
        lanes,
        strip_rows,
        _ceil_div(rows, strip_rows),
        unroll,
        block // 32,
    )


class BackwardTile(NamedTuple):
    """What one program does: ``num_warps`` segments of lanes over ``strip_rows`` rows."""

    programs: int
    num_warps: int
    columns: int
    vector: bool
    groups: int
    planes_per_segment: int
    tiles: int
    strip_rows: int
    strips: int
    rounds: int
    unroll: int


def backward_tile(maps: tuple[Tensor, ...], spec: PoolSpec, pools: Pools) -> BackwardTile:
    """Programs for the gradients of a map of the shape of the first of ``maps``."""
    n, c, rows, w = maps[0].shape
    columns, vector = _columns(maps, spec)
    if columns > 2:
        columns, vector = (2, vector) if w % 2 == 0 and vector else (1, False)
    groups = _ceil_div(w, columns)
    planes_per_segment, tiles = 1, 1
    if groups <= SEGMENT:
        planes_per_segment = SEGMENT // groups
    else:
        halo = _ceil_div(pools.radius_w, columns)
        tiles = _ceil_div(groups - 2 * halo, SEGMENT - 2 * halo)
    num_warps = 4
    unroll = 2
    strips = 1
    segments = _ceil_div(n * c, planes_per_segment)
    return BackwardTile(
        _ceil_div(segments, num_warps) * tiles * strips,
        num_warps,
        columns,
        vector,
        groups,
        planes_per_segment,
        tiles,
        _ceil_div(rows, unroll) * unroll,
        strips,
        (min(groups, SEGMENT) - 1).bit_length(),
        unroll,
    )
