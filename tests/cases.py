"""Shapes, candidates, layouts, data and tolerances: every test and benchmark takes them here."""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from metapool_kernels import DEFAULT_CANDIDATES, pool_candidates

Size = tuple[int, int, int, int]

SHAPES: dict[str, tuple[Size, str]] = {
    "one": ((1, 1, 1, 1), "one plane of one pixel: every window is padding but one tap"),
    "no_batch": ((0, 3, 5, 4), "N = 0 gives empty outputs and zero gradients"),
    "no_batch_gray": ((0, 1, 3, 4), "and with C = 1, where any strides pass for contiguous"),
    "pixels": ((3, 17, 1, 1), "H = W = 1 makes the memory format ambiguous"),
    "gray": ((2, 1, 5, 6), "C = 1 makes the memory format ambiguous"),
    "row": ((2, 3, 1, 9), "a single row under every window"),
    "column": ((2, 3, 9, 1), "a single column under every window"),
    "two": ((1, 2, 2, 2), "the whole map is smaller than a 3x3 window"),
    "under_5": ((2, 3, 4, 4), "H and W between the windows 3 and 5"),
    "low": ((1, 2, 3, 40), "H below the windows 5 and 7, W above"),
    "narrow": ((1, 2, 40, 3), "W below the windows 5 and 7, H above"),
    "w15": ((1, 2, 5, 15), "one less than a vector of 16 floats, two of 8"),
    "w16": ((1, 2, 5, 16), "exactly such vectors"),
    "w17": ((1, 2, 5, 17), "one more"),
    "w31": ((1, 2, 4, 31), "one less than 32 lanes of half precision"),
    "w33": ((1, 2, 4, 33), "one more"),
    "c17": ((1, 17, 6, 5), "channels one above a vector, as channels_last runs along them"),
    "primes": ((2, 5, 11, 13), "no size divides any block"),
    "map7": ((2, 20, 7, 7), "the last maps of a mobile network"),
    "map14": ((1, 12, 14, 14), "its middle maps"),
    "wide": ((1, 1, 9, 301), "one wide plane: work is split inside a plane or not at all"),
    "tall": ((1, 1, 257, 6), "one tall plane"),
    "planes": ((7, 13, 3, 3), "many planes, each smaller than a vector"),
}
"""Sizes (N, C, H, W) by name, each with the reason why it is here."""

SWEEP = tuple(range(1, 71))
"""Numbers of columns or planes across all boundaries of vectors, blocks and groups of planes."""

SWEEPS: dict[str, tuple[Callable[[int], Size], str]] = {
    "width_of_one": (lambda n: (1, 1, 5, n), "one plane: vectors lie along its rows at any width"),
    "width_of_two": (lambda n: (1, 2, 4, n), "side by side below 24 columns, then along rows"),
    "width_of_many": (lambda n: (1, 23, 3, n), "planes side by side: 16, then a quad and three"),
    "channels": (lambda n: (1, n, 4, 3), "any number of planes side by side, 3 columns: no quads"),
    "channels_twice": (lambda n: (2, n, 2, 6), "groups of planes that go over from image to image"),
}
"""Sizes that grow with a number of SWEEP, each with what the CPU kernels do with it. Channels of
channels_last lie side by side wherever there are two: its widths are those of packed rows."""

MOBILENET_V2_MAPS: tuple[tuple[int, int, int], ...] = (
    (96, 56, 56),
    (144, 56, 56),
    (144, 28, 28),
    (192, 28, 28),
    (384, 14, 14),
    (576, 14, 14),
    (960, 7, 7),
)
"""(C, H, W) of MobileNetV2's expanded feature maps at 224x224, for the benchmarks."""

CANDIDATES: dict[str, tuple[str, ...]] = {
    "default": DEFAULT_CANDIDATES,
    "avg": pool_candidates(kinds=("avg",), skip=False),
    "max": pool_candidates(kinds=("max",), skip=False),
    "no_skip": pool_candidates(skip=False),
    "strips": ("avg_pool_1x7", "avg_pool_7x1", "max_pool_1x7", "max_pool_7x1"),
    "largest": ("max_pool_15x15", "avg_pool_15x15"),
    "rectangular": ("avg_pool_3x5", "max_pool_3x5", "max_pool_5x3"),
    "with_none": ("none", "max_pool_3x3", "avg_pool_3x3"),
    "only_none": ("none",),
    "duplicates": ("max_pool_3x3", "avg_pool_3x3", "max_pool_3x3", "avg_pool_3x3"),
    "one_max": ("max_pool_3x3",),
    "one_avg": ("avg_pool_5x5",),
    "only_skip": ("skip_connect",),
    "ones": ("max_pool_1x1", "avg_pool_1x1", "skip_connect"),
    "unsorted": ("avg_pool_7x7", "max_pool_1x3", "skip_connect", "max_pool_5x5", "avg_pool_3x1"),
    "pyramid": ("skip_connect", "max_pool_5x5", "max_pool_9x9", "max_pool_13x13"),
    "huge": ("max_pool_15x15", "avg_pool_7x7", "max_pool_11x11", "max_pool_3x3"),
}

ALPHA_SHAPES: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "k": lambda n, c, k: (k,),
    "ck": lambda n, c, k: (c, k),
    "n1k": lambda n, c, k: (n, 1, k),
    "nck": lambda n, c, k: (n, c, k),
}

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _sliced(base: Tensor) -> Tensor:
    n, c, h, w = base.shape
    outer = base.new_full((n + 1, c + 2, h + 3, w + 5), torch.nan)
    return outer[1:, 1 : c + 1, 2 : h + 2, 3 : w + 3].copy_(base)


def _sliced_channels_last(base: Tensor) -> Tensor:
    n, c, h, w = base.shape
    outer = base.new_full((n, c + 3, h + 1, w + 2), torch.nan)
    outer = outer.to(memory_format=torch.channels_last)
    return outer[:, 1 : c + 1, 1:, 1 : w + 1].copy_(base)


def _stepped(base: Tensor) -> Tensor:
    outer = base.new_full((*base.shape[:2], 2 * base.shape[2], 3 * base.shape[3]), torch.nan)
    return outer[:, :, ::2, ::3].copy_(base)


def _offset(base: Tensor) -> Tensor:
    outer = base.new_full((base.numel() + 1,), torch.nan)
    return outer[1:].view(base.shape).copy_(base)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda base: base.contiguous(),
    "channels_last": lambda base: base.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "sliced_channels_last": _sliced_channels_last,
    "stepped": _stepped,
    "offset": _offset,
    "permuted": lambda base: base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "transposed": lambda base: base.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded_batch": lambda base: base[:1].expand_as(base),
    "expanded_channels": lambda base: base[:, :1].expand_as(base),
    "expanded_width": lambda base: base[..., :1].expand_as(base),
}
"""From a contiguous tensor to one of its shape in another layout; expanding repeats values."""

NATIVE_LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class View:
    """A layout that no name stands for: any order of the axes in memory, gaps, steps, an offset."""

    order: tuple[int, int, int, int] = (0, 1, 2, 3)
    """Axes from the outermost to the innermost in memory."""
    steps: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Of each axis, every how many elements one is seen; 0 repeats the first."""
    gaps: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Elements of each axis that nobody sees, before the first."""
    offset: int = 0
    """Elements in memory before the first; they are NaN, as all that nobody sees."""

    def __call__(self, base: Tensor) -> Tensor:
        seen = [
            min(size, 1) if step == 0 else size
            for size, step in zip(base.shape, self.steps, strict=True)
        ]
        each = [max(step, 1) for step in self.steps]
        outer = [g + size * step for g, size, step in zip(self.gaps, seen, each, strict=True)]
        memory = base.new_full((self.offset + math.prod(outer),), torch.nan)[self.offset :]
        within = memory.view([outer[axis] for axis in self.order])
        axes = within.permute([self.order.index(axis) for axis in range(4)])
        cut = axes[tuple(slice(g, None, step) for g, step in zip(self.gaps, each, strict=True))]
        first = base[tuple(slice(size) for size in seen)]
        return cut.copy_(first).expand_as(base)


Layout = str | View


def laid_out(base: Tensor, layout: Layout) -> Tensor:
    """A contiguous tensor in one of LAYOUTS, or in a layout without a name."""
    return layout(base) if isinstance(layout, View) else LAYOUTS[layout](base)


def _normal(size: Size, rng: torch.Generator) -> Tensor:
    return torch.randn(size, generator=rng, dtype=torch.float64)


def _sprinkle(size: Size, rng: torch.Generator, values: tuple[float, ...]) -> Tensor:
    x = _normal(size, rng)
    where = torch.rand(size, generator=rng) < 0.1
    picks = torch.randint(len(values), size, generator=rng)
    return torch.where(where, torch.tensor(values, dtype=torch.float64)[picks], x)


def _minus_inf_block(size: Size, rng: torch.Generator) -> Tensor:
    x = _normal(size, rng)
    x[..., : size[2] // 2 + 1, :] = -torch.inf
    return x


def _distinct(size: Size, rng: torch.Generator) -> Tensor:
    count = size[0] * size[1] * size[2] * size[3]
    return torch.randperm(count, generator=rng).double().view(size) / 8 - count / 16


DATA: dict[str, Callable[[Size, torch.Generator], Tensor]] = {
    "normal": _normal,
    "relu6": lambda size, rng: (_normal(size, rng) * 4 - 2).clamp(0, 6),
    "equal": lambda size, rng: torch.full(size, 0.7, dtype=torch.float64),
    "nan": lambda size, rng: _sprinkle(size, rng, (torch.nan,)),
    "inf": lambda size, rng: _sprinkle(size, rng, (torch.inf, -torch.inf)),
    "nan_inf": lambda size, rng: _sprinkle(size, rng, (torch.nan, torch.inf, -torch.inf)),
    "minus_inf": lambda size, rng: torch.full(size, -torch.inf, dtype=torch.float64),
    "minus_inf_block": _minus_inf_block,
    "signed_zero": lambda size, rng: torch.zeros(size).double().copysign(_normal(size, rng)),
    "distinct": _distinct,
    "offset": lambda size, rng: 1000 + _normal(size, rng),
    "huge": lambda size, rng: _normal(size, rng).clamp(-2, 2) / 2,
    "tiny": lambda size, rng: _normal(size, rng),
}
"""Data by name, drawn in float64. ``huge`` and ``tiny`` are scaled by :func:`_scale`."""

NON_FINITE = ("nan", "inf", "nan_inf", "minus_inf", "minus_inf_block")


def _largest(dtype: torch.dtype) -> float:
    """What accumulates in its own range may not overflow in a 15x15 sum; float16 sums are wide."""
    return torch.finfo(dtype).max * (0.98 if dtype is torch.float16 else 1 / 256)


def _scale(data: str, dtype: torch.dtype) -> float:
    if data == "huge":
        return _largest(dtype)
    return torch.finfo(dtype).smallest_normal if data == "tiny" else 1.0


def _palette(dtype: torch.dtype) -> list[float]:
    """Numbers at every end of a dtype, and some that tie: zeros of both signs, denormals, ones."""
    limits = torch.finfo(dtype)
    denormal = limits.smallest_normal * limits.eps
    sizes = [0.0, denormal, 3 * denormal, limits.smallest_normal, 1.0, 6.0, _largest(dtype)]
    return [sign * size for size in sizes for sign in (1.0, -1.0)]


PALETTES: dict[str, Callable[[torch.dtype], list[float]]] = {
    "ends": _palette,
    "everything": lambda dtype: [*_palette(dtype), torch.nan, torch.inf, -torch.inf],
}
"""Data of a few numbers that depend on the dtype: each map is full of ties, and of extremes."""


def _drawn(data: str, size: Size, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    if data in PALETTES:
        numbers = torch.tensor(PALETTES[data](dtype), dtype=torch.float64)
        return numbers[torch.randint(len(numbers), size, generator=rng)].to(dtype)
    return (DATA[data](size, rng) * _scale(data, dtype)).to(dtype)


@dataclass(frozen=True)
class Case:
    """One call of the op. Tests vary one or two fields and leave the rest."""

    size: Size = SHAPES["primes"][0]
    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    data: str = "normal"
    candidates: tuple[str, ...] = DEFAULT_CANDIDATES
    stride: int | tuple[int, int] = 1
    count_include_pad: bool = True
    normalize: str | None = "softmax"
    alpha: str = "k"
    alpha_dtype: torch.dtype | None = None
    grad_layout: Layout = "contiguous"
    form: str = "mix"
    """``"mix"``; ``"stack"`` for poolings side by side, which have no use for alpha;
    ``"normalized"`` for the mixture of poolings normalised by their own statistics."""

    def __str__(self) -> str:
        parts = [
            _name(field.name, getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return "-".join(parts) or "plain"

    def rng(self) -> torch.Generator:
        """A generator that depends on the case alone."""
        return torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments of the op in this form, but for the backend."""
        windows = {"stride": self.stride, "count_include_pad": self.count_include_pad}
        return windows if self.form == "stack" else {"normalize": self.normalize, **windows}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``x``, ``alpha`` and a gradient of the output; none of them requires grad."""
        rng = self.rng()
        base = _drawn(self.data, self.size, self.dtype, rng)
        x = laid_out(base, self.layout)
        n, c, h, w = self.size
        shape = ALPHA_SHAPES[self.alpha](n, c, len(self.candidates))
        alpha = torch.randn(shape, generator=rng, dtype=torch.float64)
        rows, columns = self.stride if isinstance(self.stride, tuple) else (self.stride,) * 2
        maps = len(self.candidates) if self.form == "stack" else 1
        out_size = (n, maps * c, (h - 1) // rows + 1, (w - 1) // columns + 1)
        grad_out = torch.randn(out_size, generator=rng, dtype=torch.float64).to(self.dtype)
        return x, alpha.to(self.alpha_dtype or self.dtype), laid_out(grad_out, self.grad_layout)


def _name(field: str, value: object) -> str:
    if field == "size":
        return next((name for name, (size, _) in SHAPES.items() if size == value), f"{value}")
    if field == "candidates":
        return next((name for name, names in CANDIDATES.items() if names == value), f"{value}")
    if field == "stride":
        return f"stride{value}"
    if field == "count_include_pad":
        return "no_pad_count"
    if field == "normalize":
        return "raw"
    prefix = {"alpha": "alpha_", "alpha_dtype": "alpha_"}.get(field, "")
    return prefix + str(value).removeprefix("torch.")


def _side_by_side() -> Iterator[Case]:
    for layout in NATIVE_LAYOUTS:
        case = Case(layout=layout, form="stack")
        for size, _ in SHAPES.values():
            if size != case.size:
                yield replace(case, size=size)
            yield replace(case, size=size, candidates=CANDIDATES["unsorted"])
        for names in CANDIDATES.values():
            yield from (replace(case, candidates=names, dtype=dtype) for dtype in DTYPES)
            yield replace(case, candidates=names, count_include_pad=False)
        for stride in (2, (3, 1), (20, 20)):
            yield replace(case, candidates=CANDIDATES["no_skip"], stride=stride)
    for layout in LAYOUTS:
        yield Case(layout=layout, grad_layout=layout, form="stack", data="relu6")


def _normalized() -> Iterator[Case]:
    for layout in NATIVE_LAYOUTS:
        case = Case(layout=layout, form="normalized")
        for name, (size, _) in SHAPES.items():
            if name != "one":  # which has no variance
                # Streamed, whatever streams them.
                if name in ("w16", "w17", "wide", "tall", "planes"):
                    yield replace(case, size=size)
                yield replace(case, size=size, candidates=CANDIDATES["unsorted"])
                yield replace(case, size=size, dtype=torch.float64)
        for names in CANDIDATES.values():
            yield from (replace(case, candidates=names, dtype=dtype) for dtype in DTYPES)
            yield replace(case, candidates=names, count_include_pad=False, normalize=None)
        for stride in (2, (3, 1)):
            yield replace(case, candidates=CANDIDATES["no_skip"], stride=stride)
        for alpha in ALPHA_SHAPES:
            yield from (replace(case, alpha=alpha, dtype=dtype) for dtype in DTYPES)
        for data in ("relu6", "equal", "offset"):  # in float64 the truth is no more exact itself
            yield from (
                replace(case, data=data, dtype=dtype) for dtype in DTYPES if dtype.itemsize < 8
            )
    for layout in LAYOUTS:
        yield Case(layout=layout, grad_layout=layout, form="normalized", data="relu6")


def _grid() -> Iterator[Case]:
    for layout in NATIVE_LAYOUTS:
        for size, _ in SHAPES.values():
            yield from (Case(size, dtype, layout) for dtype in DTYPES)
        for names in CANDIDATES.values():
            case = Case(layout=layout, candidates=names, normalize=None)
            yield from (case, replace(case, count_include_pad=False))
            yield replace(case, dtype=torch.bfloat16)
        for stride in (2, 3, (1, 2), (3, 1), (20, 20)):
            for names in (CANDIDATES["no_skip"], CANDIDATES["rectangular"]):
                yield Case(layout=layout, candidates=names, stride=stride)
                yield Case(
                    SHAPES["w17"][0], layout=layout, candidates=names, stride=stride,
                    count_include_pad=False,
                )  # fmt: skip
        for alpha in ALPHA_SHAPES:
            yield Case(layout=layout, alpha=alpha, normalize=None)
            yield from (Case(dtype=dtype, layout=layout, alpha=alpha) for dtype in DTYPES)
    for layout in LAYOUTS:
        yield from (Case(dtype=dtype, layout=layout) for dtype in DTYPES)
        yield Case(SHAPES["c17"][0], layout=layout, alpha="nck", data="relu6")
    yield from _side_by_side()
    yield from _normalized()
    yield Case(SHAPES["no_batch_gray"][0], alpha="ck", candidates=CANDIDATES["one_avg"])
    for dtype in (torch.float16, torch.bfloat16):
        yield from (Case(dtype=dtype, alpha=a, alpha_dtype=torch.float32) for a in ALPHA_SHAPES)


GRID = tuple(dict.fromkeys(_grid()))
"""Finite data over shapes, dtypes, layouts, candidates, strides and alpha: forward, backward."""


def _data_grid() -> Iterator[Case]:
    for layout in NATIVE_LAYOUTS:
        for data in DATA:
            for dtype in DTYPES:
                for names in ("default", "max", "avg"):
                    yield Case(dtype=dtype, layout=layout, data=data, candidates=CANDIDATES[names])
            yield Case(data=data, layout=layout, candidates=CANDIDATES["largest"])
            yield Case(data=data, layout=layout, candidates=CANDIDATES["max"], stride=2)
            yield Case(
                data=data, layout=layout, candidates=CANDIDATES["avg"], count_include_pad=False
            )
            yield from (
                Case(data=data, layout=layout, candidates=CANDIDATES[names], form="stack")
                for names in ("default", "pyramid")
            )
            if data not in ("huge", "tiny"):  # whose squares are no numbers of the dtype
                yield Case(data=data, layout=layout, form="normalized")
            # Equal candidates with weights of both signs: their infinities cancel into NaN.
            yield Case(
                data=data, layout=layout, candidates=CANDIDATES["duplicates"], normalize=None
            )


DATA_GRID = tuple(dict.fromkeys(_data_grid()))
"""Every kind of data over dtypes, kinds of candidates and both native layouts."""


def _sweep_cases() -> Iterator[Case]:
    yield from (Case(dtype=dtype) for dtype in DTYPES)
    yield Case(data="relu6")
    yield Case(data="nan", dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        yield Case(dtype=dtype, candidates=CANDIDATES["strips"], alpha="nck")
    yield Case(candidates=CANDIDATES["unsorted"], count_include_pad=False)
    yield Case(candidates=CANDIDATES["largest"])
    yield Case(candidates=CANDIDATES["rectangular"], stride=2)
    yield Case(candidates=CANDIDATES["huge"], form="stack")
    yield Case(form="normalized")


SWEEP_CASES = tuple(_sweep_cases())
"""What is asked of each size of SWEEPS: unrolled radii, larger ones, those with NaN, strides."""
