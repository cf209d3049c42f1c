"""Derivatives of every order, from two ops.

For fixed maxima (``x`` picks them and is otherwise constant) the op is the trilinear form

    T(g, v, w) = <g, sum_k w_k P_k(v)>.

``meta_pool_fwd`` is its gradient in ``g``; ``meta_pool_bwd`` holds its gradients in ``v`` and
``w``. Poolings side by side are the form ``<g, P(v)>`` of two of these: there ``w`` is None. The
gradient of each of these is again one of them with other arguments, so
differentiation never leaves the two Functions below, backward or forward, at any order.
Only ``x`` (or ``x`` and ``v``) and ``w`` are saved.

A compiler sees neither Function but an op for each, which leads to it when the graph is lowered or
run: so a traced call, an exported program and a transform of torch.func inside of either have the
same derivatives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from metapool_kernels.ops import LIBRARY, TRACED_OPS, meta_pool_bwd, meta_pool_fwd
from metapool_kernels.spec import PoolSpec, arguments_of, make_spec

Mask = tuple[bool, bool]


def pool(x: Tensor, weights: Tensor | None, values: Tensor | None, spec: PoolSpec) -> Tensor:
    """Differentiable :func:`metapool_kernels.ops.meta_pool_fwd`."""
    if torch.compiler.is_compiling():
        out: Tensor = TRACED_OPS[spec.backend][0](x, weights, values, *arguments_of(spec))
        return out
    return _pool(x, weights, values, spec)


def _pool(x: Tensor, weights: Tensor | None, values: Tensor | None, spec: PoolSpec) -> Tensor:
    if _needs_autograd(x, weights, values):
        out: Tensor = _Pool.apply(x, weights, values, spec)
        return out
    return meta_pool_fwd(x, weights, values, spec)


def pool_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor | None,
    values: Tensor | None,
    spec: PoolSpec,
    mask: Mask,
) -> tuple[Tensor, Tensor]:
    """Differentiable :func:`metapool_kernels.ops.meta_pool_bwd`."""
    if torch.compiler.is_compiling():
        op = TRACED_OPS[spec.backend][1]
        grads: tuple[Tensor, Tensor] = op(grad_out, x, weights, values, *arguments_of(spec), mask)
        return grads
    return _pool_backward(grad_out, x, weights, values, spec, mask)


def _pool_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor | None,
    values: Tensor | None,
    spec: PoolSpec,
    mask: Mask,
) -> tuple[Tensor, Tensor]:
    if _needs_autograd(grad_out, x, weights, values):
        grads: tuple[Tensor, Tensor] = _PoolBackward.apply(grad_out, x, weights, values, spec, mask)
        return grads
    return meta_pool_bwd(grad_out, x, weights, values, spec, mask)


def _needs_autograd(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    # Both are private and have no public twin: an open forward-mode level, a functorch transform.
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Pool(Function):
    @staticmethod
    def forward(x: Tensor, weights: Tensor | None, values: Tensor | None, spec: PoolSpec) -> Tensor:
        return meta_pool_fwd(x, weights, values, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weights, values, ctx.spec = inputs
        ctx.save_for_backward(x, weights, values)
        ctx.save_for_forward(x, weights, values)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, values = ctx.saved_tensors
        wants_x, wants_weights, wants_values = ctx.needs_input_grad[:3]
        mask = (wants_x if values is None else wants_values, wants_weights)
        grads = pool_backward(grad_out, x, weights, values, ctx.spec, mask)
        grad_values, grad_weights = (g if m else None for g, m in zip(grads, mask, strict=True))
        if values is None:
            return grad_values, grad_weights, None, None
        return None, grad_weights, grad_values, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, weights, values = ctx.saved_tensors
        d_x, d_weights, d_values, _ = tangents
        d_values = d_x if values is None else d_values
        along_values = None if d_values is None else pool(x, weights, d_values, ctx.spec)
        along_weights = None if d_weights is None else pool(x, d_weights, values, ctx.spec)
        tangent = _add(along_values, along_weights)
        return torch.zeros_like(pool(x, weights, values, ctx.spec)) if tangent is None else tangent

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        weights: Tensor | None,
        values: Tensor | None,
        spec: PoolSpec,
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        maps = (_fold_map(t, d, size) for t, d in ((x, in_dims[0]), (values, in_dims[2])))
        folded_x, folded_values = maps
        assert folded_x is not None
        n = _images(x, in_dims[0])
        out = pool(folded_x, _fold_weights(weights, in_dims[1], size, n), folded_values, spec)
        return out.unflatten(0, (size, n)), 0


class _PoolBackward(Function):
    @staticmethod
    def forward(
        grad_out: Tensor,
        x: Tensor,
        weights: Tensor | None,
        values: Tensor | None,
        spec: PoolSpec,
        mask: Mask,
    ) -> tuple[Tensor, Tensor]:
        return meta_pool_bwd(grad_out, x, weights, values, spec, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad_out, x, weights, values, ctx.spec, mask = inputs
        ctx.mask = mask[0], mask[1] and weights is not None
        ctx.save_for_backward(grad_out, x, weights, values)
        ctx.save_for_forward(grad_out, x, weights, values)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, x, weights, values = ctx.saved_tensors
        v, u = (c if m else None for c, m in zip(cotangents, ctx.mask, strict=True))
        wants_g, wants_x, wants_weights, wants_values = ctx.needs_input_grad[:4]

        grad_g = grad_weights = grad_values = None
        if wants_g:
            along_v = None if v is None else pool(x, weights, v, ctx.spec)
            along_u = None if u is None else pool(x, u, values, ctx.spec)
            grad_g = _add(along_v, along_u)

        mask = (
            u is not None and (wants_x if values is None else wants_values),
            v is not None and wants_weights,
        )
        if any(mask):
            grads = pool_backward(
                grad_out, x, weights if u is None else u, v if mask[1] else None, ctx.spec, mask
            )
            grad_values, grad_weights = (g if m else None for g, m in zip(grads, mask, strict=True))
        if values is None:
            return grad_g, grad_values, grad_weights, None, None, None
        return grad_g, None, grad_weights, grad_values, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        grad_out, x, weights, values = ctx.saved_tensors
        d_g, d_x, d_weights, d_values = tangents[:4]
        d_values = d_x if values is None else d_values

        mask = (
            ctx.mask[0] and d_weights is not None,
            ctx.mask[1] and d_values is not None,
        )
        along_g: tuple[Tensor | None, Tensor | None] = (None, None)
        if d_g is not None:
            along_g = grads = pool_backward(d_g, x, weights, values, ctx.spec, ctx.mask)
            if not any(mask):
                return grads
        grads = pool_backward(
            grad_out,
            x,
            weights if d_weights is None else d_weights,
            d_values if mask[1] else None,
            ctx.spec,
            ctx.mask,
        )
        tangent_values, tangent_weights = (
            _add(a, g if m else torch.zeros_like(g))
            for a, g, m in zip(along_g, grads, mask, strict=True)
        )
        assert tangent_values is not None and tangent_weights is not None
        return tangent_values, tangent_weights

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        grad_out: Tensor,
        x: Tensor,
        weights: Tensor | None,
        values: Tensor | None,
        spec: PoolSpec,
        mask: Mask,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
        size = info.batch_size
        folded_g, folded_x, folded_values = (
            _fold_map(t, d, size)
            for t, d in ((grad_out, in_dims[0]), (x, in_dims[1]), (values, in_dims[3]))
        )
        assert folded_g is not None and folded_x is not None
        n = _images(x, in_dims[1])
        folded_weights = _fold_weights(weights, in_dims[2], size, n)
        grad_x, grad_weights = pool_backward(
            folded_g, folded_x, folded_weights, folded_values, spec, mask
        )
        if mask[0]:
            grad_x = grad_x.unflatten(0, (size, n))
        if mask[1]:
            assert weights is not None
            shape = weights.shape if in_dims[2] is None else weights.movedim(in_dims[2], 0)[0].shape
            grad_weights = _unfold_grad_weights(grad_weights, size, n, shape)
        return (grad_x, grad_weights), (0 if mask[0] else None, 0 if mask[1] else None)


def _fold_map(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Move the mapped dimension of a (N, C, H, W) tensor into N."""
    if t is None:
        return None
    batched = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return batched.flatten(0, 1)


def _images(x: Tensor, dim: int | None) -> int:
    """N of a (N, C, H, W) tensor with one more, mapped, dimension."""
    return x.shape[0] if dim is None or dim > 0 else x.shape[1]


def _fold_weights(weights: Tensor | None, dim: int | None, size: int, n: int) -> Tensor | None:
    """Move the mapped dimension of the weights into N: (size * n, 1 or C, K)."""
    if weights is None:
        return None
    batched = weights.expand(size, *weights.shape) if dim is None else weights.movedim(dim, 0)
    if batched.dim() == 2:
        batched = batched[:, None, None, :]
    elif batched.dim() == 3:
        batched = batched[:, None]
    return batched.expand(size, n, *batched.shape[2:]).flatten(0, 1)


def _unfold_grad_weights(grad: Tensor, size: int, n: int, shape: torch.Size) -> Tensor:
    """Undo :func:`_fold_weights` for a gradient: sum what was expanded to (size, n, ...)."""
    grad = grad.unflatten(0, (size, n))
    if len(shape) < 3:
        grad = grad.sum(1)
    return grad.reshape(size, *shape)


def _register(backend: str) -> None:
    """Let the ops of what is traced be what the functions above are outside of any trace."""
    forward, backward = TRACED_OPS[backend]

    def run_forward(
        x: Tensor, weights: Tensor | None, values: Tensor | None, *arguments: Any
    ) -> Tensor:
        return _pool(x, weights, values, make_spec(backend, *arguments))

    def run_backward(
        grad_out: Tensor, x: Tensor, weights: Tensor | None, values: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *arguments, mask = rest
        spec = make_spec(backend, *arguments)
        return _pool_backward(grad_out, x, weights, values, spec, (mask[0], mask[1]))

    for op, run in ((forward, run_forward), (backward, run_backward)):
        for key in _KEYS:
            LIBRARY.impl(op.name(), run, key)


_KEYS = ("Autograd", "CompositeExplicitAutograd", "FuncTorchDynamicLayerFrontMode")
"""Where a call of a traced op arrives first: with autograd, in inference mode, and within a
transform of torch.func, which has to see the Function itself and not what that calls."""

for _backend in TRACED_OPS:
    _register(_backend)
