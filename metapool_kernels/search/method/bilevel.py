r"""The upper level: the gradient in alpha of what the weights reach, task by task.

A task k is a receptive field: the alphas of all open layers tilted towards candidate k, so that
its mixture is :math:`m(k) = \mathrm{softmax}(\alpha + \beta e_k)`. To be minimised over alpha is

.. math:: \frac{1}{T} \sum_k L_{val}(w'_k, m(k)), \qquad
          w'_k = w - \xi \nabla_w L_{train}(w, m(k)).

Nothing here knows a network: an objective is any function of weights, alphas and a batch, and a
batch is anything.

Sources: Finn et al., "Model-Agnostic Meta-Learning" (ICML 2017), for tasks and for fomaml; Liu et
al., "DARTS" (ICLR 2019), for the level of the alphas and the finite difference. Tasks as tilts are
ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metapool_kernels.search.settings.config import Method

DIFFERENCE_LENGTH = 0.01
"""Distance, in the space of all weights, from where they are to each end of the difference."""

Tensors = Sequence[Tensor]

Objective = Callable[[Tensors, Tensors, Any], Tensor | tuple[Tensor, Any]]
"""Of weights, alphas and a batch: the loss, alone or with anything beside it."""

_Task = Callable[[Tensors, Tensors, Any], tuple[Tensor, Any]]  # an objective, tilted
_Found = tuple[Tensors, Tensor, Any]


@dataclass(frozen=True)
class Hypergradient:
    """Means over the tasks: the gradient in each alpha, and the loss of the upper level.

    ``beside`` has what stood beside the loss, or None, for each task.
    """

    gradients: list[Tensor]
    loss: Tensor
    beside: tuple[Any, ...] = ()


def with_beside(found: Tensor | tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """The loss that an objective has given, and what stands beside it, None where it is alone."""
    return (found, None) if isinstance(found, Tensor) else found


def draw_tasks(candidates: int, tasks: int, tilt: float, seed: Sequence[int]) -> list[int | None]:
    """Candidates to tilt towards, without replacement; ``[None]`` where there is no tilt."""
    if tilt == 0:
        return [None]
    drawn = np.random.default_rng(seed).choice(candidates, min(tasks, candidates), replace=False)
    return [int(candidate) for candidate in drawn]


def tilted(alphas: Tensors, candidate: int | None, tilt: float) -> list[Tensor]:
    """The alphas of a task: ``tilt`` is added at position ``candidate`` of the last axis."""
    if candidate is None:
        return list(alphas)
    directions = (
        torch.nn.functional.one_hot(torch.tensor(candidate), alpha.shape[-1]).to(alpha)
        for alpha in alphas
    )
    return [alpha + tilt * direction for alpha, direction in zip(alphas, directions, strict=True)]


def hypergradient(
    objective: Objective,
    weights: Tensors,
    alphas: Tensors,
    train_batch: Any,
    val_batch: Any,
    *,
    method: Method = "first-order",
    xi: float = 0.0,
    tasks: Sequence[int | None] = (None,),
    tilt: float = 0.0,
) -> Hypergradient:
    """Gradient of the upper level in ``alphas``. No tensor that is passed changes.

    Args:
        objective: differentiable in weights and alphas; twice so for ``second-order``.
        weights: w, all that the step of the weights may move.
        alphas: of the open layers, (..., K).
        train_batch: for the step of the weights; not used by ``first-order``.
        val_batch: for the loss after it.
        method: as in :class:`metapool_kernels.search.settings.config.AlphaConfig`.
        xi: size of the step of the weights.
        tasks: candidates that the tasks tilt towards, None for no tilt.
        tilt: beta.
    """
    leaves = [alpha.detach().requires_grad_() for alpha in alphas]
    constants = [weight.detach() for weight in weights]
    found = []
    for task in tasks:
        of_task = partial(_with_tilt, objective, task, tilt)
        found.append(_METHODS[method](of_task, constants, leaves, train_batch, val_batch, xi))
    gradients, losses, beside = zip(*found, strict=True)
    return Hypergradient(
        [torch.stack(one_alpha).mean(0) for one_alpha in zip(*gradients, strict=True)],
        torch.stack(losses).mean(),
        beside,
    )


def importances(
    objective: Objective, weights: Tensors, alphas: Tensors, batches: Sequence[Any]
) -> list[Tensor]:
    """By how much the loss rises when a candidate is left out, each of each layer in turn.

    The others keep their proportions. Source: Wang et al., "Rethinking Architecture Selection in
    Differentiable NAS" (ICLR 2021), where accuracy stands for the loss.

    Args:
        objective: as for :func:`hypergradient`, its weights the softmax of alpha.
        weights: as they are.
        alphas: of the open layers, (K,) each.
        batches: the loss is the mean over these.

    Returns:
        A tensor (K,) for each alpha; zeros where there is but one candidate.
    """
    devices = {alpha.device for alpha in alphas if alpha.is_cuda}

    def loss(of_alphas: Tensors) -> Tensor:
        # All draw the same dropout: else their differences would be noise.
        with torch.no_grad(), torch.random.fork_rng(devices):
            losses = [with_beside(objective(weights, of_alphas, b))[0] for b in batches]
            return torch.stack(losses).mean()

    whole = loss(alphas)
    found = []
    for i, alpha in enumerate(alphas):
        rises = torch.zeros_like(alpha)
        for k in range(len(alpha) if len(alpha) > 1 else 0):
            without = alpha.detach().clone()
            without[k] = -torch.inf
            rises[k] = loss([*alphas[:i], without, *alphas[i + 1 :]]) - whole
        found.append(rises)
    return found


def _with_tilt(
    objective: Objective,
    task: int | None,
    tilt: float,
    weights: Tensors,
    alphas: Tensors,
    batch: Any,
) -> tuple[Tensor, Any]:
    return with_beside(objective(weights, tilted(alphas, task, tilt), batch))


def _first_order(
    objective: _Task, w: Tensors, alphas: Tensors, train: Any, val: Any, xi: float
) -> _Found:
    loss, beside = objective(w, alphas, val)
    return torch.autograd.grad(loss, alphas), loss.detach(), beside


def _fomaml(
    objective: _Task, w: Tensors, alphas: Tensors, train: Any, val: Any, xi: float
) -> _Found:
    fixed = [alpha.detach() for alpha in alphas]
    stepped = [weight.detach() for weight in _inner_step(objective, w, fixed, train, xi)]
    return _first_order(objective, stepped, alphas, train, val, xi)


def _second_order(
    objective: _Task, w: Tensors, alphas: Tensors, train: Any, val: Any, xi: float
) -> _Found:
    stepped = _inner_step(objective, w, alphas, train, xi)
    return _first_order(objective, stepped, alphas, train, val, xi)


def _finite_difference(
    objective: _Task, w: Tensors, alphas: Tensors, train: Any, val: Any, xi: float
) -> _Found:
    fixed = [alpha.detach() for alpha in alphas]
    inner = _inner_step(objective, w, fixed, train, xi)
    stepped = [weight.detach().requires_grad_() for weight in inner]
    loss, beside = objective(stepped, alphas, val)
    gradients = torch.autograd.grad(loss, [*alphas, *stepped], materialize_grads=True)
    direct, v = gradients[: len(alphas)], gradients[len(alphas) :]
    through = _mixed_derivative(objective, w, alphas, v, train)
    return [d - xi * t for d, t in zip(direct, through, strict=True)], loss.detach(), beside


_METHODS: dict[Method, Callable[[_Task, Tensors, Tensors, Any, Any, float], _Found]] = {
    "first-order": _first_order,
    "fomaml": _fomaml,
    "second-order": _second_order,
    "finite-difference": _finite_difference,
}


def _inner_step(
    objective: _Task, weights: Tensors, alphas: Tensors, batch: Any, xi: float
) -> list[Tensor]:
    """w', a function of the alphas where these require gradients."""
    free = [weight.detach().requires_grad_() for weight in weights]
    loss, _ = objective(free, alphas, batch)
    through = any(alpha.requires_grad for alpha in alphas)
    gradients = torch.autograd.grad(loss, free, create_graph=through, materialize_grads=True)
    return [weight - xi * grad for weight, grad in zip(weights, gradients, strict=True)]


def _mixed_derivative(
    objective: _Task, weights: Tensors, alphas: Tensors, v: Tensors, batch: Any
) -> list[Tensor]:
    """How the gradient in alpha changes along ``v`` in the space of the weights."""
    norm = torch.stack([part.norm() for part in v]).norm()
    if norm == 0:
        return [torch.zeros_like(alpha) for alpha in alphas]
    epsilon = DIFFERENCE_LENGTH / norm
    ends = []
    for sign in (1, -1):
        moved = [weight + sign * epsilon * part for weight, part in zip(weights, v, strict=True)]
        # Both ends draw the same dropout: else their difference would be noise.
        with torch.random.fork_rng({part.device for part in v if part.is_cuda}):
            loss, _ = objective(moved, alphas, batch)
        ends.append(torch.autograd.grad(loss, alphas))
    return [(plus - minus) / (2 * epsilon) for plus, minus in zip(*ends, strict=True)]
