"""One step of each level, first order: alpha on its own half, then the weights on theirs.

Each step moves one group of parameters and leaves the other, bit for bit, as it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.utils.metrics import accuracy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from metapool_kernels.search.data import Batch


@contextmanager
def batch_norm_buffers_kept(model: nn.Module) -> Iterator[None]:
    """Normalise by the statistics of the batch without adding them to the running ones."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def alpha_step(
    model: nn.Module, alphas: Sequence[Tensor], batch: Batch, optimizer: Optimizer
) -> tuple[float, float]:
    """Move the architecture parameters down the loss of ``batch``.

    Weights and BatchNorm buffers stay as they are.

    Args:
        model: the supernet, in training mode.
        alphas: the architecture parameters of the open layers; ``optimizer`` holds the same.
        batch: images (N, C, H, W) and class numbers (N,) of the alpha half.
        optimizer: updates ``alphas``.

    Returns:
        Loss and accuracy in percent, before the step.
    """
    with batch_norm_buffers_kept(model):
        loss, percent = _loss(model, batch)
    _set_gradients(loss, alphas)
    optimizer.step()
    return loss.item(), percent


def weight_step(
    model: nn.Module, weights: Sequence[Tensor], batch: Batch, optimizer: Optimizer, clip: float
) -> tuple[float, float]:
    """Move the weights down the loss of ``batch``; the norm of the gradient is clipped.

    Args:
        model: the supernet or a derived network, in training mode.
        weights: all parameters but alpha; ``optimizer`` holds the same.
        batch: images (N, C, H, W) and class numbers (N,).
        optimizer: updates ``weights``.
        clip: largest norm of the gradient of all weights together.

    Returns:
        Loss and accuracy in percent, before the step.
    """
    loss, percent = _loss(model, batch)
    _set_gradients(loss, weights)
    nn.utils.clip_grad_norm_(weights, clip)
    optimizer.step()
    return loss.item(), percent


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    images, targets = batch
    logits = model(images.contiguous(memory_format=torch.channels_last))
    (percent,) = accuracy(logits.detach(), targets)
    return F.cross_entropy(logits, targets), percent.item()


def _set_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> None:
    # autograd.grad rather than backward(): nothing is computed for, or left in, the other group.
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
