"""Optimizers of the two levels."""

from collections.abc import Sequence

import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor
from torch.optim import Adam, Optimizer

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.collective import mean_over_processes
from metapool_kernels.search.method.bilevel import Hypergradient
from metapool_kernels.search.settings.config import AlphaConfig, WeightConfig


def make_weight_optimizer(
    weights: Sequence[Tensor], config: WeightConfig, steps: int
) -> tuple[Optimizer, CosineLRScheduler]:
    """The optimizer of that name in timm, and its cosine schedule over ``steps`` steps.

    The schedule has no state: ``step_update(step)`` sets the learning rate of any step.

    Raises:
        UserError: timm has no such optimizer, or it needs more than gradients.
    """
    try:
        optimizer = create_optimizer_v2(
            list(weights),
            config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"timm cannot make optimizer {config.optimizer!r}: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"optimizer {config.optimizer!r} needs second derivatives of the loss, which are not "
            "computed for it; take another"
        )
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps,
        warmup_t=round(config.lr_warmup * steps),
        t_in_epochs=False,
    )
    return optimizer, schedule


def make_alpha_optimizer(alphas: Sequence[Tensor], config: AlphaConfig) -> Adam:
    """Adam for the alphas of the open layers, of which there may be none."""
    # A group, unlike a bare list, may be empty: that is a search resumed after its last stop.
    groups = [{"params": list(alphas)}]
    return Adam(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def alpha_step(
    alphas: Sequence[Tensor],
    optimizer: Optimizer,
    hypergradients: Sequence[Hypergradient],
    cost_gradients: Sequence[Tensor] | None = None,
    *,
    finite_only: bool = False,
) -> Tensor:
    """Move the architecture parameters along the mean of some hypergradients, of all processes.

    ``cost_gradients``, which all processes have alike, are added to it. ``finite_only`` takes no
    step where the mean is not finite. No gradient is left in the alphas: what trains the weights
    may hold them too.

    Returns:
        The loss in this process, before the step.
    """
    per_alpha = zip(*(found.gradients for found in hypergradients), strict=True)
    means = [torch.stack(gradients).mean(0) for gradients in per_alpha]
    averaged = mean_over_processes(means)
    loss = torch.stack([found.loss for found in hypergradients]).mean()
    if finite_only and not all(gradient.isfinite().all() for gradient in averaged):
        return loss
    for alpha, gradient in zip(alphas, averaged, strict=True):
        alpha.grad = gradient
    if cost_gradients is not None:
        for alpha, gradient in zip(alphas, cost_gradients, strict=True):
            alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient
    _follow(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _follow(optimizer: Optimizer) -> None:
    """Bring its state to where the parameters are, which may have moved since it was loaded."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = value.to(parameter.device)


def forget(optimizer: Optimizer, parameter: Tensor) -> None:
    """Take a parameter and its state out of an optimizer."""
    for group in optimizer.param_groups:
        group["params"] = [other for other in group["params"] if other is not parameter]
    # timm's Lookahead leaves the state to the optimizer inside it.
    getattr(optimizer, "_base_optimizer", optimizer).state.pop(parameter, None)
    parameter.grad = None
