r"""Poolings that are normalised before they are mixed, and the derivatives of that.

.. math:: y_{n,c} = \sum_k w_{n,c,k} \frac{P_k(x_{n,c}) - \mu_{c,k}}{\sigma_{c,k}}

is the mixture with weights ``w / sigma`` and a constant for each channel, so forward is one pass
for the moments, where they are not given, and one for the mixture; backward is one for the products
of ``grad_out`` with the poolings and one that sends each pooling

.. math:: \frac{1}{\sigma} (w g - A - n B)

where n is the normalised pooling, and A and B are the means of ``w g`` and of ``w g n`` (zero where
moments are given). No pooled map is kept. What differentiates backward once more, or traces or maps
over the call, gets the same from poolings side by side (:func:`_composed`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function, forward_ad

from metapool_kernels.layout import in_layout, output_size
from metapool_kernels.moments import affine_bwd, affine_fwd, pool_moments, pool_products
from metapool_kernels.ops import meta_pool_bwd
from metapool_kernels.spec import PoolSpec


class Moments(NamedTuple):
    """Mean and biased variance of the poolings that are normalised, each (P, C)."""

    mean: Tensor
    variance: Tensor
    size: int
    """Of values that each is taken over; 0 where that is not known."""

    def double(self) -> "Moments":
        """Both in float64, as the kernels have them."""
        return Moments(self.mean.double(), self.variance.double(), self.size)


class Call(NamedTuple):
    """What a call says beside its tensors."""

    spec: PoolSpec
    """Of the backend whose kernels run; not used by "reference"."""
    pools: list[int]
    """Positions of the candidates that are normalised: the poolings."""
    side_by_side: Callable[[Tensor], Tensor]
    """All poolings of a map in the accumulation dtype, differentiable to every order."""
    eps: float
    group: Any
    """Processes that share a batch, or None."""


def normalized_pool(
    x: Tensor, weights: Tensor, given: Moments | None, call: Call, *, fused: bool
) -> tuple[Tensor, Moments]:
    """The mixture of normalised poolings, and the moments that it was normalised by.

    Args:
        x: (N, C, H, W).
        weights: (K,), (C, K), (N, 1, K) or (N, C, K) in the accumulation dtype.
        given: the moments to normalise by; None takes those of the poolings of ``x``.
        call: everything else.
        fused: whether there are kernels, and the call may run where only they see it.
    """
    if not fused or _is_transformed():
        return _composed(x, weights, given, call)
    with torch.no_grad():
        moments = _moments(x, call) if given is None else given.double()
    follows = given is None and bool(call.pools)  # whether moments change with x
    out: Tensor = _NormalizedPool.apply(x, weights, moments, follows, call)
    return out, moments


def _is_transformed() -> bool:
    """Whether the call is traced, within a transform of torch.func, or at a forward-mode level."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def _moments(x: Tensor, call: Call) -> Moments:
    """The moments of the poolings of ``x``, of all processes that share the batch."""
    pools = call.pools
    if not pools:
        nothing = x.new_empty((0, x.shape[1]), dtype=torch.float64)
        return Moments(nothing, nothing, 0)
    spec = call.spec._replace(candidates=tuple(call.spec.candidates[k] for k in pools))
    planes = pool_moments(x, spec).permute(3, 0, 2, 1)  # (2, N, P, C)
    rows, columns = output_size((x.shape[2], x.shape[3]), call.spec.stride)
    count = x.shape[0] * rows * columns
    if count > 0:
        apart, mean = torch.var_mean(planes[0], 0, correction=0)
        deviations = planes[1].sum(0) + count * apart
    else:
        mean = deviations = planes.new_zeros(planes.shape[2:])
    if call.group is not None:
        own = torch.stack((torch.full_like(mean, count), mean, deviations))
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(call.group))]
        dist.all_gather(every, own, call.group)
        counts, means, squares = torch.stack(every, 1)
        mean, deviations = _together(counts, means, squares)
        count = int(counts[:, 0, 0].sum())
    return Moments(mean, deviations / max(count, 1), count)


def _together(counts: Tensor, means: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and squared deviations of groups of values together, from those of each: the first axis.

    Source: Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.
    """
    total = counts.sum(0).clamp(min=1)
    # An empty group has no mean: it would be NaN.
    mean = torch.where(counts > 0, means * (counts / total), 0).sum(0)
    apart = torch.where(counts > 0, deviations + counts * (means - mean).square(), 0)
    return mean, apart.sum(0)


class _NormalizedPool(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, moments: Moments, follows: bool, call: Call
    ) -> Tensor:
        # For all candidates, (C, K): those that are not normalised have mean 0 and scale 1.
        mean = moments.mean.new_zeros(x.shape[1], len(call.spec.candidates))
        scale = torch.ones_like(mean)
        mean[:, call.pools] = moments.mean.T
        scale[:, call.pools] = (moments.variance + call.eps).rsqrt().T
        scaled = _scaled(weights, scale)
        # Taken from the weights as they are rounded, so that a large mean cancels.
        constants = -(scaled.double() * mean).sum(-1, keepdim=True).to(weights.dtype)
        ctx.save_for_backward(x, weights, mean, scale)
        ctx.given, ctx.size, ctx.call = None if follows else moments, moments.size, call
        return affine_fwd(x, scaled, constants, call.spec)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, mean, scale = ctx.saved_tensors
        call, spec, follows = ctx.call, ctx.call.spec, ctx.given is None
        wants_x, wants_weights = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            wanted = ctx.needs_input_grad
            return *_composed_grads(grad_out, x, weights, ctx.given, call, wanted), *_REST

        scaled = _scaled(weights, scale)
        grad_x = grad_weights = None
        if not follows and not wants_weights:
            grad_x, _ = meta_pool_bwd(grad_out, x, scaled, None, spec, (True, False))
            return grad_x, None, *_REST
        shifts = mean.to(weights.dtype)
        sums = pool_products(grad_out, x, shifts, spec)
        sums = sums.sum(0) if scaled.dim() == 2 else sums
        totals, products = sums.unbind(-1)  # (C, K) or (N, C, K)
        normalized = scale * (products - (mean - shifts.double()) * totals)  # <g, n_k>
        if wants_weights:
            grad_weights = normalized.sum_to_size(
                (1,) * (normalized.dim() - weights.dim()) + weights.shape
            )
            grad_weights = grad_weights.reshape(weights.shape).to(weights.dtype)
        if wants_x and not follows:
            grad_x, _ = meta_pool_bwd(grad_out, x, scaled, None, spec, (True, False))
        elif follows:
            # All processes take part, whatever each of them wants.
            sums = torch.stack((weights * totals, weights * normalized))
            sums = sums.sum(1) if sums.dim() == 4 else sums
            if call.group is not None:
                dist.all_reduce(sums, group=call.group)
            sums /= max(ctx.size, 1)
            sums[..., [k for k in range(mean.shape[1]) if k not in call.pools]] = 0
            slopes = -scale.square() * sums[1]
            offsets = -scale * sums[0] - slopes * (mean - shifts.double())
            if wants_x:
                grad_x = affine_bwd(
                    grad_out,
                    x,
                    scaled,
                    offsets.to(weights.dtype),
                    slopes.to(weights.dtype),
                    shifts,
                    spec,
                )
        return grad_x, grad_weights, *_REST


def _scaled(weights: Tensor, scale: Tensor) -> Tensor:
    return (weights * scale).to(weights.dtype)


_REST = (None, None, None)
"""Gradients of what is no tensor."""


def _composed_grads(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    given: Moments | None,
    call: Call,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weights that can be differentiated again."""
    inputs = [t for t, wants in zip((x, weights), wanted, strict=False) if wants]
    out, _ = _composed(x, weights, given, call)
    grads = iter(
        torch.autograd.grad(out, inputs, grad_out, create_graph=True, materialize_grads=True)
    )
    return next(grads) if wanted[0] else None, next(grads) if wanted[1] else None


def _composed(
    x: Tensor, weights: Tensor, given: Moments | None, call: Call
) -> tuple[Tensor, Moments]:
    """The definition, from poolings side by side: differentiable to every order."""
    pools, count = call.pools, len(call.spec.candidates)
    pooled = call.side_by_side(x.to(weights.dtype)).unflatten(1, (count, x.shape[1]))
    moments = _moments_of(pooled[:, pools], call.group) if given is None else given
    shifts = moments.mean.to(weights.dtype)[..., None, None]
    scales = (moments.variance.to(weights.dtype) + call.eps).rsqrt()[..., None, None]
    total: Tensor | None = None
    for k in range(count):
        term = pooled[:, k]
        if k in pools:
            term = (term - shifts[pools.index(k)]) * scales[pools.index(k)]
        term = weights[..., k, None, None] * term
        total = term if total is None else total + term
    assert total is not None
    return in_layout(total.to(x.dtype), call.spec.channels_last), moments


def _moments_of(pooled: Tensor, group: Any) -> Moments:
    """The same of (N, P, C, H, W), differentiable."""
    count = pooled.shape[0] * pooled.shape[3] * pooled.shape[4]
    add_up = _alone if group is None else partial(_sum_over, group)
    if group is not None:
        counts = torch.tensor(count, device=pooled.device)
        dist.all_reduce(counts, group=group)
        count = int(counts)
    mean = add_up(pooled.sum((0, 3, 4))) / max(count, 1)
    deviations = add_up((pooled - mean[..., None, None]).square().sum((0, 3, 4)))
    return Moments(mean, deviations / max(count, 1), count)


def _alone(sums: Tensor) -> Tensor:
    return sums


def _sum_over(group: Any, sums: Tensor) -> Tensor:
    """Over the processes of a group, differentiable."""
    from torch.distributed.nn.functional import all_reduce  # not there in every build of torch

    total: Tensor = all_reduce(sums, group=group)
    return total
