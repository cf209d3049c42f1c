"""The registered ops: their schemas, fake kernels and typed entry points.

The schemas live here, so the ops exist (for tracing, fake and meta tensors) even where the
compiled library does not. ``python_bindings/torch_ops.cpp`` holds the CPU kernels.

Both ops are linear in each of ``values`` (or ``grad_out``) and ``weights``; ``x`` only picks the
maxima. ``values=None`` means that ``values`` is ``x`` itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metapool_kernels.layout import empty_map, output_size


class PoolSpec(NamedTuple):
    """The arguments of a call that are not tensors, in the order of the schemas."""

    candidates: tuple[int, ...]
    """One :attr:`metapool_kernels.candidates.Candidate.code` per weight."""
    stride: tuple[int, int]
    count_include_pad: bool
    channels_last: bool
    """Layout of every map that the ops return, see :mod:`metapool_kernels.layout`."""


_LIBRARY = torch.library.Library("metapool_kernels", "DEF")
_SPEC = "int[] candidates, int[] stride, bool count_include_pad, bool channels_last"
_LIBRARY.define(
    f"meta_pool_fwd(Tensor x, Tensor weights, Tensor? values, {_SPEC}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "meta_pool_bwd(Tensor grad_out, Tensor x, Tensor weights, Tensor? values, "
    f"{_SPEC}, bool[2] output_mask) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _meta_pool_fwd_fake(
    x: Tensor,
    weights: Tensor,
    values: Tensor | None,
    candidates: Sequence[int],
    stride: tuple[int, int],
    count_include_pad: bool,
    channels_last: bool,
) -> Tensor:
    size = (*x.shape[:2], *output_size((x.shape[2], x.shape[3]), stride))
    return empty_map(x, size, channels_last)


def _meta_pool_bwd_fake(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    values: Tensor | None,
    candidates: Sequence[int],
    stride: tuple[int, int],
    count_include_pad: bool,
    channels_last: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    grad_x = empty_map(x, x.shape, channels_last) if output_mask[0] else x.new_empty(0)
    grad_weights = weights.new_empty(weights.shape if output_mask[1] else (0,))
    return grad_x, grad_weights


torch.library.register_fake("metapool_kernels::meta_pool_fwd", _meta_pool_fwd_fake, lib=_LIBRARY)
torch.library.register_fake("metapool_kernels::meta_pool_bwd", _meta_pool_bwd_fake, lib=_LIBRARY)

# Looked up once: the attributes of torch.ops cost as much as a small kernel.
_FWD = torch.ops.metapool_kernels.meta_pool_fwd.default
_BWD = torch.ops.metapool_kernels.meta_pool_bwd.default


def meta_pool_fwd(x: Tensor, weights: Tensor, values: Tensor | None, spec: PoolSpec) -> Tensor:
    """``sum_k weights_k * P_k(values)``, every maximum being picked by ``x``.

    Args:
        x: (N, C, H, W).
        weights: (K,), (C, K), (N, 1, K) or (N, C, K), in the accumulation dtype.
        values: shape and dtype of ``x``, any strides; None stands for ``x``.
        spec: the arguments that are not tensors.

    Returns:
        (N, C, H_out, W_out) in the dtype of ``x``.
    """
    out: Tensor = _FWD(x, weights, values, *spec)
    return out


def meta_pool_bwd(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    values: Tensor | None,
    spec: PoolSpec,
    output_mask: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of ``<grad_out, meta_pool_fwd(x, weights, values)>`` for values and weights.

    Args:
        grad_out: (N, C, H_out, W_out) in the dtype of ``x``.
        x, weights, values, spec: as for :func:`meta_pool_fwd`.
        output_mask: which of the two gradients are wanted.

    Returns:
        The gradient of ``values`` in the shape and dtype of ``x`` and that of ``weights`` in its
        shape and dtype; an empty tensor of one dimension stands for one that is not wanted.
    """
    grads: tuple[Tensor, Tensor] = _BWD(grad_out, x, weights, values, *spec, output_mask)
    return grads
