"""OpenCV's ``blur`` and ``dilate``: the strongest peer in the forward, one image at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.cases import Case
from metapool_kernels.candidates import Candidate, Kind, parse_candidates

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

Array = np.ndarray[Any, np.dtype[Any]]
GROUP = 128
"""Channels of one image that OpenCV 5 takes (4 took 512). More are cut into equal groups below it:
measured, groups of 16 to 128 channels cost the same per channel, single channels three times it."""


def suits(case: Case) -> bool:
    """Whether OpenCV is here and has the dtype."""
    return cv2 is not None and case.dtype is torch.float32


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads over images, each of which then runs OpenCV with one."""
    return ThreadPoolExecutor(threads)


_scratch = threading.local()


def _buffer(shape: tuple[int, ...]) -> Array:
    """Room for one pooling that this thread keeps."""
    kept: Array | None = getattr(_scratch, "array", None)
    if kept is None or kept.shape != shape:
        _scratch.array = kept = np.empty(shape, np.float32)
    return kept


def _into(image: Array, candidate: Candidate, out: Array) -> Array:
    """One pooling of an image (H, W, C) into ``out``, with the borders of the op."""
    if candidate.kind is Kind.AVG:
        return cv2.blur(image, (candidate.kw, candidate.kh), out, borderType=cv2.BORDER_CONSTANT)
    kernel = np.ones((candidate.kh, candidate.kw), np.uint8)
    return cv2.dilate(image, kernel, out, borderType=cv2.BORDER_CONSTANT)


def _groups(channels: int) -> Iterator[slice]:
    """Equal shares of the channels, as few as OpenCV takes."""
    count = -(-channels // GROUP)
    edges = [channels * i // count for i in range(count + 1)]
    return (slice(*pair) for pair in pairwise(edges))


def _each_part(x: Tensor, work: Callable[[int, slice, Array], None]) -> None:
    """Run ``work(n, channels, image)`` on every image and group of channels, in threads."""
    images = x.permute(0, 2, 3, 1).numpy()
    threads = torch.get_num_threads()

    def one(n: int) -> None:
        for part in _groups(x.shape[1]):
            work(n, part, np.ascontiguousarray(images[n, :, :, part]))

    cv2.setNumThreads(threads if len(images) == 1 else 1)
    if threads == 1 or len(images) == 1:
        for n in range(len(images)):
            one(n)
    else:
        list(_pool(threads).map(one, range(len(images))))


def mixed(names: tuple[str, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """The poolings and their weighted sum, pooled and added group by group."""
    parsed = parse_candidates(names)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        shares = weights.tolist()
        out = torch.empty_like(x)
        outs = out.permute(0, 2, 3, 1).numpy()

        def work(n: int, part: slice, image: Array) -> None:
            target = outs[n, :, :, part]
            total = target if target.flags.c_contiguous else np.empty_like(image)
            total.fill(0)
            for share, candidate in zip(shares, parsed, strict=True):
                skip = candidate.kind is Kind.SKIP
                pooled = image if skip else _into(image, candidate, _buffer(image.shape))
                cv2.scaleAdd(pooled, share, total, total)
            if total is not target:
                target[...] = total

        _each_part(x, work)
        return out

    return run


def poolings(names: tuple[str, ...]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """The poolings alone, each into a map of its own that is kept between calls."""
    parsed = [c for c in parse_candidates(names) if c.kind is not Kind.SKIP]
    kept: list[Tensor] = []

    def run(x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        if not kept or kept[0].shape != x.shape:
            kept[:] = [torch.empty_like(x) for _ in parsed]
        outs = [out.permute(0, 2, 3, 1).numpy() for out in kept]

        def work(n: int, part: slice, image: Array) -> None:
            for out, candidate in zip(outs, parsed, strict=True):
                target = out[n, :, :, part]
                whole = target.flags.c_contiguous
                pooled = _into(image, candidate, target if whole else _buffer(image.shape))
                if not whole:
                    target[...] = pooled

        _each_part(x, work)
        return tuple(kept)

    return run
