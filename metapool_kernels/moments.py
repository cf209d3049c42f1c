"""What normalising takes beside the two ops: moments of poolings, and mixtures with constants.

None of these is differentiable: :mod:`metapool_kernels.normalized` puts derivatives together from
them. Each is one pass of the kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from metapool_kernels.layout import empty_map, output_size
from metapool_kernels.ops import (
    LIBRARY,
    PREFIXES,
    check_memory,
    launches,
    triton_kernels,
)
from metapool_kernels.spec import SPEC_SCHEMA, PoolSpec, arguments_of, make_spec


def _moments_fake(x: Tensor, candidates: Sequence[int], *arguments: Any) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], len(candidates), 2), dtype=torch.float64)


def _products_fake(
    grad_out: Tensor, x: Tensor, shifts: Tensor, candidates: Sequence[int], *arguments: Any
) -> Tensor:
    return _moments_fake(x, candidates)


def _affine_fwd_fake(x: Tensor, weights: Tensor, constants: Tensor, *arguments: Any) -> Tensor:
    spec = make_spec("cpu", *arguments)
    n, c, h, w = x.shape
    return empty_map(x, (n, c, *output_size((h, w), spec.stride)), spec.channels_last)


def _affine_bwd_fake(grad_out: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return empty_map(x, x.shape, make_spec("cpu", *rest[-4:]).channels_last)


def _triton_moments(x: Tensor, *arguments: Any) -> Tensor:
    spec = make_spec("triton", *arguments)
    check_memory(x, None, None, None, spec)
    out: Tensor = triton_kernels().pool_moments(x, spec)
    return out


def _triton_products(grad_out: Tensor, x: Tensor, shifts: Tensor, *arguments: Any) -> Tensor:
    spec = make_spec("triton", *arguments)
    check_memory(x, shifts, None, grad_out, spec)
    out: Tensor = triton_kernels().pool_products(grad_out, x, shifts, spec)
    return out


def _triton_affine_fwd(x: Tensor, weights: Tensor, constants: Tensor, *arguments: Any) -> Tensor:
    spec = make_spec("triton", *arguments)
    check_memory(x, weights, None, None, spec)
    n, c = x.shape[:2]
    if constants.shape not in ((c, 1), (n, c, 1)):
        raise RuntimeError("meta_pool: constants should have shape (C, 1) or (N, C, 1)")
    out: Tensor = triton_kernels().affine_fwd(x, weights, constants, spec)
    return out


def _triton_affine_bwd(grad_out: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *terms, spec = *rest[:4], make_spec("triton", *rest[4:])
    check_memory(x, terms[0], None, grad_out, spec)
    n, c, count = *x.shape[:2], len(spec.candidates)
    if any(term.shape not in ((c, count), (n, c, count)) for term in terms):
        raise RuntimeError("meta_pool: terms of fields should have shape (C, K) or (N, C, K)")
    out: Tensor = triton_kernels().affine_bwd(grad_out, x, *terms, spec)
    return out


def _define(name: str, tensors: str, fake: Any, on_triton: Any) -> dict[str, Any]:
    """Define the op of each backend, and return them by backend."""
    ops = {}
    for backend, prefix in PREFIXES.items():
        own = f"{prefix}meta_pool_{name}"
        tags = (torch.Tag.pt2_compliant_tag,)
        LIBRARY.define(f"{own}({tensors}, {SPEC_SCHEMA}) -> Tensor", tags=tags)
        torch.library.register_fake(f"metapool_kernels::{own}", fake, lib=LIBRARY)
        ops[backend] = getattr(torch.ops.metapool_kernels, own).default
    for device in ("CUDA", "CPU"):  # as in ops.py
        LIBRARY.impl(f"{PREFIXES['triton']}meta_pool_{name}", on_triton, device)
    return ops


_MOMENTS = _define("moments", "Tensor x", _moments_fake, _triton_moments)
_PRODUCTS = _define(
    "products", "Tensor grad_out, Tensor x, Tensor shifts", _products_fake, _triton_products
)
_AFFINE_FWD = _define(
    "affine_fwd",
    "Tensor x, Tensor weights, Tensor constants",
    _affine_fwd_fake,
    _triton_affine_fwd,
)
_AFFINE_BWD = _define(
    "affine_bwd",
    "Tensor grad_out, Tensor x, Tensor weights, Tensor offsets, Tensor slopes, Tensor shifts",
    _affine_bwd_fake,
    _triton_affine_bwd,
)


def _run(ops: dict[str, Any], name: str, spec: PoolSpec, *tensors: Tensor) -> Tensor:
    """Run such an op; Triton's needs no dispatcher where nobody could see it."""
    out: Tensor
    if launches(spec, *tensors):
        out = getattr(triton_kernels(), name)(*tensors, spec)
    else:
        out = ops[spec.backend](*tensors, *arguments_of(spec))
    return out


def pool_moments(x: Tensor, spec: PoolSpec) -> Tensor:
    """Of each plane of each pooling the mean, and the sum of squared deviations from it.

    Args:
        x: (N, C, H, W).
        spec: the arguments that are not tensors.

    Returns:
        (N, C, K, 2) in float64.
    """
    out = _run(_MOMENTS, "pool_moments", spec, x)
    # On GPUs nothing waits for a result: there squares overflow, as in PyTorch's own norm.
    again = spec.backend == "cpu" and _overflowed(out, x)
    return _run(_MOMENTS, "pool_moments", spec, x.double()) if again else out


def _overflowed(moments: Tensor, x: Tensor) -> bool:
    """Whether squares of deviations were more than float32 holds."""
    if x.dtype is torch.float64 or x.device.type == "meta" or is_fake(x):
        return False
    return bool((moments[..., 1] == torch.inf).any())


def pool_products(grad_out: Tensor, x: Tensor, shifts: Tensor, spec: PoolSpec) -> Tensor:
    """Of each plane the sum of ``grad_out``, and that of ``grad_out * (P_k(x) - shifts_k)``.

    Args:
        grad_out: (N, C, H_out, W_out) in the dtype of ``x``.
        x: (N, C, H, W).
        shifts: (C, K) in the accumulation dtype.
        spec: the arguments that are not tensors.

    Returns:
        (N, C, K, 2) in float64.
    """
    return _run(_PRODUCTS, "pool_products", spec, grad_out, x, shifts)


def affine_fwd(x: Tensor, weights: Tensor, constants: Tensor, spec: PoolSpec) -> Tensor:
    """``constants + sum_k weights_k * P_k(x)``, rounded once.

    Args:
        x: (N, C, H, W).
        weights: (C, K) or (N, C, K), in the accumulation dtype.
        constants: (C, 1) or (N, C, 1), likewise.
        spec: the arguments that are not tensors.

    Returns:
        (N, C, H_out, W_out) in the dtype of ``x``.
    """
    return _run(_AFFINE_FWD, "affine_fwd", spec, x, weights, constants)


def affine_bwd(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    slopes: Tensor,
    shifts: Tensor,
    spec: PoolSpec,
) -> Tensor:
    """The gradient of ``x`` where candidate k is sent a field that depends on its own values.

    That is ``weights_k * grad_out + offsets_k + slopes_k * (P_k(x) - shifts_k)``.

    Args:
        grad_out: (N, C, H_out, W_out) in the dtype of ``x``.
        x: (N, C, H, W).
        weights, offsets, slopes, shifts: (C, K) or (N, C, K), in the accumulation dtype.
        spec: the arguments that are not tensors.

    Returns:
        (N, C, H, W) in the dtype of ``x``.
    """
    terms = (weights, offsets, slopes, shifts)
    return _run(_AFFINE_BWD, "affine_bwd", spec, grad_out, x, *terms)
