"""One step of each level on a real network: alpha on its own half, the weights on theirs.

Each step moves one group of parameters and leaves the other, bit for bit, as it was.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.optim import Optimizer

from metapool_kernels.search.data.splits import Batch
from metapool_kernels.search.machine.processes import mean_over_processes
from metapool_kernels.search.method.bilevel import Hypergradient, Objective
from metapool_kernels.search.settings.config import WeightConfig
from metapool_kernels.search.training.stateless import Stateless


def network_objective(
    model: nn.Module,
    weight_names: Sequence[str],
    alpha_names: Sequence[str],
    label_smoothing: float = 0.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Objective:
    """Loss of a network, in its present mode, as a function of its weights and alphas.

    ``autocast`` makes what it is computed in, as :meth:`accelerate.Accelerator.autocast` does.

    Normalisation layers in training mode use the statistics of the batch; these, as every other
    change of a buffer, go into copies and are forgotten.
    """
    parameters = dict(model.named_parameters())
    moved = [parameters[name] for name in (*weight_names, *alpha_names)]
    buffers = list(model.buffers())
    stateless = Stateless(model)

    def objective(
        weights: Sequence[Tensor], alphas: Sequence[Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        put = {id(buffer): buffer.clone() for buffer in buffers}
        put |= {id(own): tensor for own, tensor in zip(moved, (*weights, *alphas), strict=True)}
        return batch_loss(stateless.with_tensors(put), batch, label_smoothing, autocast)

    return objective


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, on ``device``, images in channels_last."""
    for images, targets in batches:
        moved = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        yield moved, targets.to(device, non_blocking=True)


def alpha_step(
    accelerator: Accelerator,
    alphas: Sequence[Tensor],
    optimizer: Optimizer,
    hypergradients: Sequence[Hypergradient],
    cost_gradients: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Move the architecture parameters along the mean of some hypergradients, of all processes.

    ``cost_gradients``, which all processes have alike, are added to it.

    Returns:
        Loss and accuracy in percent, before the step.
    """
    per_alpha = zip(*(found.gradients for found in hypergradients), strict=True)
    means = [torch.stack(gradients).mean(0) for gradients in per_alpha]
    for alpha, gradient in zip(alphas, mean_over_processes(accelerator, means), strict=True):
        alpha.grad = gradient
    if cost_gradients is not None:
        for alpha, gradient in zip(alphas, cost_gradients, strict=True):
            alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient
    optimizer.step()
    loss = torch.stack([found.loss for found in hypergradients]).mean()
    return loss, torch.stack([found.accuracy for found in hypergradients]).mean()


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
