"""What the op is measured against, each in the form in which a careful user would write it.

Every peer takes the weights, not alpha: the softmax of K numbers is not what is measured.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from metapool_kernels import fused_meta_pool, reference
from metapool_kernels.candidates import parse_candidates

Names = tuple[str, ...]
Run = Callable[[Tensor, Tensor], Tensor]


def ours(candidates: Names) -> Run:
    """The fused op."""
    return lambda x, weights: fused_meta_pool(x, weights, candidates, normalize=None)


def eager(candidates: Names) -> Run:
    """The poolings one after the other and their weighted sum, in plain PyTorch."""
    parsed = parse_candidates(candidates)
    return lambda x, weights: reference.mix(x, weights, parsed, (1, 1), True)


@cache
def compiled(candidates: Names) -> Run:
    """The same under torch.compile. Windows over 25 elements fall back to eager kernels in it."""
    run: Run = torch.compile(eager(candidates))
    return run


def copy(candidates: Names) -> Run:
    """A copy of x: what any op has to read and write at least."""
    return lambda x, weights: x.clone()


PEERS: dict[str, tuple[Callable[[Names], Run], torch.memory_format]] = {
    "ours": (ours, torch.contiguous_format),
    "ours channels_last": (ours, torch.channels_last),
    "eager": (eager, torch.contiguous_format),
    "eager channels_last": (eager, torch.channels_last),
    "torch.compile": (compiled, torch.contiguous_format),
    "copy": (copy, torch.contiguous_format),
}
"""By name: what runs, and the memory format that it is given."""

OURS = ("ours", "ours channels_last")
EAGER = "eager"
COPY = "copy"
