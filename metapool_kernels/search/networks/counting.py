"""What a network computes and moves, counted and not measured."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from metapool_kernels.convertible import to_plain
from metapool_kernels.plain import Form

aten = torch.ops.aten

_FORM = Form(pad_outside=False)  # runtimes put such padding back into the pooling


class Counts(NamedTuple):
    """For one image.

    Attributes:
        macs: multiply-adds of convolutions and linear layers, as torch.utils.flop_counter has them,
            and comparisons or additions of poolings, each window as a strip of its height and one
            of its width: (kh - 1) + (kw - 1) for each output.
        bytes: of all that each operator reads and writes, weights too, without views.
    """

    macs: int
    bytes: int


def count(network: nn.Module, image_shape: Sequence[int]) -> Counts:
    """Count what a network does in eval mode, in its plain form; it stays as it is itself."""
    plain = to_plain(copy.deepcopy(network).cpu().eval(), _FORM)
    image = torch.zeros(1, *image_shape)
    traffic, flops = _Traffic(), FlopCounterMode(display=False, custom_mapping=_POOLINGS)
    with torch.no_grad(), traffic, flops:
        plain(image)
    return Counts(flops.get_total_flops() // 2, traffic.bytes)


def _pooling_flops(x: Sequence[int], kernel: Sequence[int], *_: Any, **named: Any) -> int:
    out = named["out_shape"]
    shape = out if isinstance(out, torch.Size) else out[0]
    sides = kernel if len(kernel) > 1 else [kernel[0]] * 2
    # Two for each, as a multiply-add has.
    return 2 * math.prod(shape) * sum(side - 1 for side in sides)


_POOLINGS: dict[Any, Any] = {
    aten.max_pool2d_with_indices: _pooling_flops,
    aten.avg_pool2d: _pooling_flops,
}


class _Traffic(TorchDispatchMode):
    """Counts the bytes of all floating-point tensors that go into operators and come out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = (
                leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)
            )
            # Whole numbers are the places of maxima, which an exported pooling does not give.
            self.bytes += sum(t.nbytes for t in tensors if t.is_floating_point())
        return out
