"""The lower level on a real network: the loss of a batch, and a step of the weights down it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.optim import Optimizer

from metapool_kernels.search.data.splits import Batch
from metapool_kernels.search.settings.config import WeightConfig


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, on ``device``, images in channels_last."""
    for images, targets in batches:
        moved = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        yield moved, targets.to(device, non_blocking=True)


def weight_step(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: Optimizer,
    config: WeightConfig,
) -> tuple[Tensor, Tensor]:
    """Move the weights down the loss of all ``batches`` together, in all processes.

    Args:
        accelerator: accumulates over as many batches as there are.
        model: what the accelerator has prepared, in training mode.
        batches: images (N, C, H, W) and class numbers (N,).
        optimizer: of the weights; the norm of their gradient is clipped.
        config: how.

    Returns:
        Loss and accuracy in percent, before the step.
    """
    seen = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss, accuracy = batch_loss(model, batch, config.label_smoothing, accelerator.autocast)
            accelerator.backward(loss)
            seen.append(torch.stack([loss.detach(), accuracy]))
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    accelerator.clip_grad_norm_(weights, config.clip)
    optimizer.step()
    optimizer.zero_grad()
    loss, accuracy = torch.stack(seen).mean(0).unbind()
    return loss, accuracy


def batch_loss(
    forward: Callable[[Tensor], Tensor],
    batch: Batch,
    label_smoothing: float,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[Tensor, Tensor]:
    """Cross entropy, and accuracy in percent.

    Raises:
        ValueError: what comes out is not one row of numbers for each image.
    """
    images, targets = batch
    # Here and not in the network, which is taken apart and put together while it is searched.
    with autocast():
        logits: Tensor = forward(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits)
        raise ValueError(f"it should give ({len(images)}, classes) numbers, got {given}")
    logits = convert_to_fp32(logits)
    correct = (logits.detach().argmax(1) == targets).float()
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return loss, 100 * correct.mean()
