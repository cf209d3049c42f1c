"""Shapes and memory layout of the output: decided here for every backend and fake kernel."""

import torch
from torch import Tensor


def output_size(size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the output; the same for every candidate, whatever its window."""
    return (size[0] - 1) // stride[0] + 1, (size[1] - 1) // stride[1] + 1


def is_channels_last(x: Tensor) -> bool:
    """Whether the output for ``x``, shape (N, C, H, W), is laid out with channels last.

    This is the rule of aten's pooling (``Tensor::suggest_memory_format``): the order of the
    strides decides, also for slices and where C = 1 or H = W = 1 leaves the layout ambiguous.
    Everything that is not ordered like channels_last gives a contiguous output.
    """
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    smallest = 0
    for dim in (1, 3, 2, 0):
        size, stride = sizes[dim], strides[dim]
        if size == 0 or stride < smallest or (dim == 0 and smallest == strides[1]):
            return False
        smallest = stride * size if size > 1 else stride
    return True


def empty_map(like: Tensor, size: tuple[int, ...], channels_last: bool) -> Tensor:
    """An uninitialised map of that size, in the dtype and on the device of ``like``."""
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last)
    )


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` itself where its strides are as asked for, else a copy; differentiable."""
    _, c, h, w = x.shape
    # is_contiguous() would take any stride of an axis of one element for right.
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    if x.stride() == strides:
        return x
    return x.clone(memory_format=memory_format(channels_last))


def memory_format(channels_last: bool) -> torch.memory_format:
    """The torch constant for the answer of :func:`is_channels_last`."""
    return torch.channels_last if channels_last else torch.contiguous_format
