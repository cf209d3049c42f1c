"""What a call says beside its tensors, and the arguments of the ops that stand for it."""

from collections.abc import Sequence
from typing import NamedTuple


class PoolSpec(NamedTuple):
    """What a call says beside its tensors."""

    candidates: tuple[int, ...]
    """One :attr:`metapool_kernels.candidates.Candidate.code` per weight."""
    stride: tuple[int, int]
    count_include_pad: bool
    channels_last: bool
    """Layout of every map that the ops return, see :mod:`metapool_kernels.layout`."""
    backend: str = "cpu"
    """Whose kernels run: ``"cpu"``, ``"triton"`` or ``"cuda"``."""


SPEC_SCHEMA = "int[] candidates, int[] stride, bool count_include_pad, bool channels_last"
"""The arguments that every op takes behind its tensors."""


def arguments_of(spec: PoolSpec) -> tuple[tuple[int, ...], tuple[int, int], bool, bool]:
    """Those that the ops take, in the order of their schemas.

    A property of the tuple would be nearer, but torch.compile does not trace it under torch 2.10.
    """
    return spec.candidates, spec.stride, spec.count_include_pad, spec.channels_last


def make_spec(
    backend: str,
    candidates: Sequence[int],
    stride: Sequence[int],
    count_include_pad: bool,
    channels_last: bool,
) -> PoolSpec:
    """The spec of a call, from the arguments that its op was given."""
    steps = (stride[0], stride[1])
    return PoolSpec(tuple(candidates), steps, count_include_pad, channels_last, backend)
