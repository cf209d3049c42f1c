"""The registered ops: their schemas, fake kernels and typed entry points.

The schemas live here, so the ops exist (for tracing, fake and meta tensors) even where the
compiled libraries do not. ``python_bindings/torch_ops.cpp`` holds the CPU kernels, and
``torch_ops_cuda.cpp`` those in CUDA C++. Each backend has ops of its own, so that a traced call
keeps the one that was chosen for it. What is traced holds, until it is lowered, ops of other names
(``_traced``), to which ``autograd.py`` gives derivatives: with those, the ops above would cost a
call outside of any trace twice the time.

Both ops are linear in each of ``values`` (or ``grad_out``) and ``weights``; ``x`` only picks the
maxima. ``values=None`` means that ``values`` is ``x`` itself. The weights decide the form: poolings
are mixed by them; ``weights=None`` leaves poolings side by side, as (N, K * C, H_out, W_out) with
all channels of a candidate together.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from metapool_kernels.layout import empty_map, output_size
from metapool_kernels.spec import SPEC_SCHEMA, PoolSpec, arguments_of, make_spec

LIBRARY = torch.library.Library("metapool_kernels", "DEF")


def _out_size(
    x: Tensor, weights: Tensor | None, count: int, stride: tuple[int, int]
) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return (n, c if weights is not None else count * c, *output_size((h, w), stride))


def _meta_pool_fwd_fake(
    x: Tensor,
    weights: Tensor | None,
    values: Tensor | None,
    candidates: Sequence[int],
    stride: tuple[int, int],
    count_include_pad: bool,
    channels_last: bool,
) -> Tensor:
    return empty_map(x, _out_size(x, weights, len(candidates), stride), channels_last)


def _meta_pool_bwd_fake(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor | None,
    values: Tensor | None,
    candidates: Sequence[int],
    stride: tuple[int, int],
    count_include_pad: bool,
    channels_last: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    grad_x = empty_map(x, x.shape, channels_last) if output_mask[0] else x.new_empty(0)
    if weights is None:
        return grad_x, x.new_empty(0)
    return grad_x, weights.new_empty(weights.shape if output_mask[1] else (0,))


def _define(prefix: str, suffix: str = "") -> tuple[Any, Any]:
    """Define both ops under names with that prefix and suffix, and return them.

    They are looked up once: the attributes of torch.ops cost as much as a small kernel.
    """
    names = f"{prefix}meta_pool_fwd{suffix}", f"{prefix}meta_pool_bwd{suffix}"
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(
        f"{names[0]}(Tensor x, Tensor? weights, Tensor? values, {SPEC_SCHEMA}) -> Tensor", tags=tags
    )
    LIBRARY.define(
        f"{names[1]}(Tensor grad_out, Tensor x, Tensor? weights, Tensor? values, "
        f"{SPEC_SCHEMA}, bool[2] output_mask) -> (Tensor, Tensor)",
        tags=tags,
    )
    namespace = "metapool_kernels::"
    torch.library.register_fake(namespace + names[0], _meta_pool_fwd_fake, lib=LIBRARY)
    torch.library.register_fake(namespace + names[1], _meta_pool_bwd_fake, lib=LIBRARY)
    fwd, bwd = (getattr(torch.ops.metapool_kernels, name).default for name in names)
    return fwd, bwd


PREFIXES = {"cpu": "", "triton": "triton_", "cuda": "cuda_"}
_OPS = {backend: _define(prefix) for backend, prefix in PREFIXES.items()}
TRACED_OPS = {backend: _define(prefix, "_traced") for backend, prefix in PREFIXES.items()}
"""Both ops of each backend for what is traced: differentiable, and mapped over by vmap."""


@cache
def triton_kernels() -> ModuleType:
    """The kernels in Triton, which is not imported before the first call that it runs."""
    return importlib.import_module("metapool_kernels._triton")


def check_memory(
    x: Tensor,
    weights: Tensor | None,
    values: Tensor | None,
    grad_out: Tensor | None,
    spec: PoolSpec,
) -> None:
    """What Triton's kernels would otherwise read beyond; the compiled ones check it themselves."""
    if x.dim() != 4:
        raise RuntimeError("meta_pool: x should be 4-D")
    n, c, h, w = x.shape
    count = len(spec.candidates)
    shapes = ((count,), (c, count), (n, 1, count), (n, c, count))
    if weights is not None and weights.shape not in shapes:
        raise RuntimeError(
            "meta_pool: weights should have shape (K,), (C, K), (N, 1, K) or (N, C, K)"
        )
    sizes = ((values, (n, c, h, w)), (grad_out, _out_size(x, weights, count, spec.stride)))
    for tensor, size in sizes:
        if tensor is not None and tensor.shape != size:
            raise RuntimeError("meta_pool: a map has the wrong shape")
        if tensor is not None and tensor.dtype is not x.dtype:
            raise RuntimeError("meta_pool: maps should share one dtype")


def _triton_fwd(
    x: Tensor, weights: Tensor | None, values: Tensor | None, *arguments: Any
) -> Tensor:
    spec = make_spec("triton", *arguments)
    check_memory(x, weights, values, None, spec)
    out: Tensor = triton_kernels().meta_pool_fwd(x, weights, values, spec)
    return out


def _triton_bwd(
    grad_out: Tensor, x: Tensor, weights: Tensor | None, values: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *arguments, mask = rest
    spec = make_spec("triton", *arguments)
    check_memory(x, weights, values, grad_out, spec)
    grads: tuple[Tensor, Tensor] = triton_kernels().meta_pool_bwd(
        grad_out, x, weights, values, spec, tuple(mask)
    )
    return grads


for _device in ("CUDA", "CPU"):  # tensors on the CPU are for Triton's interpreter
    LIBRARY.impl("triton_meta_pool_fwd", _triton_fwd, _device)
    LIBRARY.impl("triton_meta_pool_bwd", _triton_bwd, _device)


def launches(spec: PoolSpec, *tensors: Tensor | None) -> bool:
    """Whether a call needs no dispatcher, which takes a Python kernel longer than its launch."""
    return (
        spec.backend == "triton"
        and not torch.compiler.is_compiling()
        # Nobody traces. All that is asked below is private and has no public twin.
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and all(tensor is None or _is_plain(tensor) for tensor in tensors)
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether memory holds what the tensor says: it is not fake, wrapped, negated or batched."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_neg():
        return False
    keys = torch._C._dispatch_keys(tensor)
    return (
        (keys.has(torch._C.DispatchKey.CUDA) or keys.has(torch._C.DispatchKey.CPU))
        and not keys.has(torch._C.DispatchKey.ZeroTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def meta_pool_fwd(
    x: Tensor, weights: Tensor | None, values: Tensor | None, spec: PoolSpec
) -> Tensor:
    """``sum_k weights_k * P_k(values)``, every maximum being picked by ``x``.

    Args:
        x: (N, C, H, W).
        weights: (K,), (C, K), (N, 1, K) or (N, C, K), in the accumulation dtype; None leaves the
            poolings side by side.
        values: shape and dtype of ``x``, any strides; None stands for ``x``.
        spec: the arguments that are not tensors.

    Returns:
        (N, C, H_out, W_out), or (N, K * C, H_out, W_out) without weights, in the dtype of ``x``.
    """
    out: Tensor
    if launches(spec, x, weights, values):
        out = triton_kernels().meta_pool_fwd(x, weights, values, spec)
    else:
        out = _OPS[spec.backend][0](x, weights, values, *arguments_of(spec))
    return out


def meta_pool_bwd(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor | None,
    values: Tensor | None,
    spec: PoolSpec,
    output_mask: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of ``<grad_out, meta_pool_fwd(x, weights, values)>`` for values and weights.

    Args:
        grad_out: shape and dtype of what :func:`meta_pool_fwd` returns.
        x, weights, values, spec: as for :func:`meta_pool_fwd`.
        output_mask: which of the two gradients are wanted.

    Returns:
        The gradient of ``values`` in the shape and dtype of ``x`` and that of ``weights`` in its
        shape and dtype; an empty tensor of one dimension stands for one that is not wanted.
    """
    grads: tuple[Tensor, Tensor]
    if launches(spec, grad_out, x, weights, values):
        grads = triton_kernels().meta_pool_bwd(grad_out, x, weights, values, spec, output_mask)
    else:
        op = _OPS[spec.backend][1]
        grads = op(grad_out, x, weights, values, *arguments_of(spec), output_mask)
    return grads
