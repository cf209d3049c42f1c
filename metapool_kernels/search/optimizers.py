"""Optimizers of the two levels."""

from collections.abc import Sequence

from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from metapool_kernels.search.config import AlphaConfig, WeightConfig


def make_weight_optimizer(
    weights: Sequence[Tensor], config: WeightConfig, steps: int
) -> tuple[SGD, CosineLRScheduler]:
    """SGD and its cosine schedule over ``steps`` steps.

    The schedule has no state: ``step_update(step)`` sets the learning rate of any step.
    """
    optimizer = SGD(
        weights, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    return optimizer, CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)


def make_alpha_optimizer(alphas: Sequence[Tensor], config: AlphaConfig) -> Adam:
    """Adam for the alphas of the open layers, of which there may be none."""
    # A group, unlike a bare list, may be empty: that is a search resumed after its last stop.
    groups = [{"params": list(alphas)}]
    return Adam(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def forget(optimizer: Optimizer, parameter: Tensor) -> None:
    """Take a parameter and its state out of an optimizer."""
    for group in optimizer.param_groups:
        group["params"] = [other for other in group["params"] if other is not parameter]
    optimizer.state.pop(parameter, None)
