"""What the op is measured against, each in the form in which a careful user would write it.

Every peer takes the weights, not alpha: the softmax of K numbers is not what is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benches import opencv
from benches.cases import Case, Mode
from metapool_kernels import fused_meta_pool, reference
from metapool_kernels.candidates import Candidate, Kind, parse_candidates

Names = tuple[str, ...]
Run = Callable[[Tensor, Tensor], Any]
STRIDE, COUNT_INCLUDE_PAD = (1, 1), True


class Product(Enum):
    """What a peer computes, and so what it is checked against."""

    MIX = "the weighted sum"
    PARTS = "the poolings alone"
    COPY = "a copy of x"


@dataclass(frozen=True)
class Peer:
    """One way to do the work.

    Args:
        make: from the names of the candidates to a function of x and the weights.
        layout: in which x comes.
        modes: what it can do.
        suits: whether it can do a case otherwise.
        product: what comes out.
        routes_ties: whether the gradient of a maximum goes to the first of equal pixels, as in
            PyTorch; if not, gradients are checked on data without ties.
    """

    make: Callable[[Names], Run]
    layout: torch.memory_format = torch.contiguous_format
    modes: tuple[Mode, ...] = tuple(Mode)
    suits: Callable[[Case], bool] = lambda case: True
    product: Product = Product.MIX
    routes_ties: bool = True


def ours(names: Names) -> Run:
    """The fused op."""
    return lambda x, weights: fused_meta_pool(x, weights, names, normalize=None)


def eager(names: Names) -> Run:
    """The poolings one after the other and their weighted sum, in plain PyTorch.

    The weights take the dtype of x: else half precision would be mixed in float32, at twice the
    traffic.
    """
    parsed = parse_candidates(names)
    return lambda x, weights: reference.mix(
        x, weights.to(x.dtype), parsed, STRIDE, COUNT_INCLUDE_PAD
    )


@cache
def compiled(names: Names) -> Run:
    """The same under torch.compile. Windows over 25 elements fall back to eager kernels in it."""
    run: Run = torch.compile(eager(names), dynamic=False)
    return run


def checkpointed(names: Names) -> Run:
    """The eager loop that saves x alone and computes the poolings again in the backward."""
    run = eager(names)
    return lambda x, weights: checkpoint(run, x, weights, use_reentrant=False)


def nested(names: Names) -> Run:
    """Larger maxima out of smaller ones: max 5x5 is max 3x3 of max 3x3, and so on."""
    parsed = parse_candidates(names)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        maxima = _nested_maxima(x, parsed)
        out = None
        for weight, candidate in zip(weights.to(x.dtype), parsed, strict=True):
            pooled = maxima.get(candidate)
            if pooled is None:
                pooled = reference.pool(x, candidate, STRIDE, COUNT_INCLUDE_PAD)
            out = weight * pooled if out is None else out + weight * pooled
        assert out is not None
        return out

    return run


def _nested_maxima(x: Tensor, candidates: Sequence[Candidate]) -> dict[Candidate, Tensor]:
    """The square max poolings, each from the next smaller one."""
    squares = {c.kh: c for c in candidates if c.kind is Kind.MAX and c.kh == c.kw}
    maxima, pooled, reached = {}, x, 1
    for side, candidate in sorted(squares.items()):
        step = side - reached + 1
        pooled, reached = F.max_pool2d(pooled, step, 1, step // 2), side
        maxima[candidate] = pooled
    return maxima


def merged(names: Names) -> Run:
    """All averages as one depthwise convolution, whose kernel is made of the weights each call."""
    parsed = parse_candidates(names)
    side = max(max(c.kh, c.kw) for c in parsed)
    boxes = torch.stack([_box(candidate, side) for candidate in parsed])

    def run(x: Tensor, weights: Tensor) -> Tensor:
        kernel = (weights.to(boxes.dtype) @ boxes).to(x.dtype).view(1, 1, side, side)
        channels = x.shape[1]
        return F.conv2d(x, kernel.expand(channels, 1, -1, -1), padding=side // 2, groups=channels)

    return run


def _box(candidate: Candidate, side: int) -> Tensor:
    """The flattened kernel of one average, in the middle of ``side`` x ``side`` zeros."""
    kernel = torch.zeros(side, side)
    top, left = (side - candidate.kh) // 2, (side - candidate.kw) // 2
    kernel[top : top + candidate.kh, left : left + candidate.kw] = 1 / (candidate.kh * candidate.kw)
    return kernel.flatten()


def copy(names: Names) -> Run:
    """A copy of x into memory that is there: what any op has to read and write at least."""
    kept: list[Tensor] = []

    def run(x: Tensor, weights: Tensor) -> Tensor:
        if not kept or kept[0].shape != x.shape or kept[0].dtype != x.dtype:
            kept[:] = [torch.empty_like(x)]
        return kept[0].copy_(x.detach())

    return run


def _has_maxima(case: Case) -> bool:
    """Half precision has ties in any data, so gradients could not be checked there."""
    return case.dtype is torch.float32 and "max" in str(case.names)


def _is_linear(case: Case) -> bool:
    return all(c.kind in (Kind.AVG, Kind.SKIP) for c in parse_candidates(case.names))


_LAST = torch.channels_last
_FIRST_ORDER = tuple(mode for mode in Mode if mode is not Mode.DOUBLE)
_MAIN = (Mode.FORWARD, Mode.BOTH)

PEERS: dict[str, Peer] = {
    "ours": Peer(ours),
    "ours channels_last": Peer(ours, _LAST),
    "eager": Peer(eager),
    "eager channels_last": Peer(eager, _LAST),
    "torch.compile": Peer(compiled, modes=_MAIN, suits=lambda case: case.slow_peers),
    "checkpointed eager": Peer(
        checkpointed, modes=(Mode.BOTH,), suits=lambda case: case.slow_peers
    ),
    "nested max": Peer(nested, modes=_MAIN, suits=_has_maxima, routes_ties=False),
    "nested max channels_last": Peer(
        nested, _LAST, modes=_MAIN, suits=_has_maxima, routes_ties=False
    ),
    "merged convolution": Peer(merged, modes=_FIRST_ORDER, suits=_is_linear),
    "merged convolution channels_last": Peer(merged, _LAST, modes=_FIRST_ORDER, suits=_is_linear),
    "OpenCV": Peer(opencv.mixed, _LAST, modes=(Mode.FORWARD,), suits=opencv.suits),
    "OpenCV, poolings alone": Peer(
        opencv.poolings, _LAST, (Mode.FORWARD,), opencv.suits, Product.PARTS
    ),
    "copy": Peer(copy, product=Product.COPY),
}
"""All of them by name, ours and the copy among them; the order is that of a round."""

OURS = ("ours", "ours channels_last")
EAGER = "eager"
COPY = "copy"


def is_torch_peer(name: str) -> bool:
    """Whether a name is that of a peer in PyTorch which gives the same as ours."""
    return name not in (*OURS, COPY) and not name.startswith("OpenCV")


def peers_for(case: Case) -> dict[str, Peer]:
    """The peers that can do a case."""
    return {
        name: peer
        for name, peer in PEERS.items()
        if (case.mode in peer.modes and peer.suits(case)) or name == COPY
    }
