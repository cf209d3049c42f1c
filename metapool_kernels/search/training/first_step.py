"""What will not work is found out before anything is written: a first step, which is taken back."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor, nn

from metapool_kernels.search.data.splits import Batch
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.kernels import compile_ahead
from metapool_kernels.search.machine.processes import seed_epoch
from metapool_kernels.search.method.bilevel import with_beside
from metapool_kernels.search.training.loop import Search
from metapool_kernels.search.training.objective import network_objective

LARGEST_ERROR = 0.01
"""Of a gradient, as a share of its length; rounding alone makes far less."""

_SUM_ERROR = 1e-3
"""Of probabilities that should sum to one."""

_IMAGES = 8
"""How many the gradients are compared on."""

# What libraries raise for shapes, labels, numbers and settings that do not fit.
_REFUSALS = (RuntimeError, ValueError, LookupError, ArithmeticError)


def check_first_step(search: Search) -> list[str]:
    """Take a step of each level as the search does, on its images and labels, and take it back.

    Returns:
        Warnings: what is doubtful about the network.

    Raises:
        UserError: the network does not train on such batches or with these optimizers, the
            precision is too low, or the network holds on to its own tensors.
    """
    config = search.config
    if config.search.alpha.method == "finite-difference" and config.precision == "bf16":
        raise UserError(
            "search.alpha.method finite-difference needs more digits than precision bf16 has; "
            "take second-order, or precision no"
        )
    batches = search.first_batches()

    def rehearse() -> None:
        with suppress(UserError):  # what it computes without kernels is anything
            _take_back_steps(search, *batches)

    compile_ahead(rehearse, search.accelerator)
    for loss in _take_back_steps(search, *batches):
        if not loss.isfinite():
            raise UserError(f"the loss of the first step is {loss.item()}; check model.weights")
    return _softmax_warnings(search, batches[0][0])


def _take_back_steps(
    search: Search, train: Sequence[Batch], validation: Sequence[Batch]
) -> list[Tensor]:
    """A step of each level and a look at its gradients, none of which leaves anything behind."""
    restore = _snapshot(search.upper.supernet.model)
    images, targets = train[0]
    try:
        losses = search.take_first_step(train, validation)
        restore()
        _check_gradients(search, (images[:_IMAGES], targets[:_IMAGES]), restore)
    except _REFUSALS as error:
        raise UserError(
            f"the network cannot train on batches of {tuple(images.shape)}: {error}"
        ) from error
    finally:
        restore()
        search.begin_training()
    return losses


def _softmax_warnings(search: Search, batch: Batch) -> list[str]:
    """A warning where all outputs for a batch are probabilities.

    Cross entropy takes a softmax itself. A second one leaves hardly any gradient; log_softmax does
    no harm, as its own softmax is what it was taken of.
    """
    restore = _snapshot(search.upper.supernet.model)
    search.model.train()
    with torch.no_grad(), search.accelerator.autocast():
        outputs = search.upper.supernet.model(batch[0])
    restore()
    error = (outputs.float().sum(1) - 1).abs().max()
    rounding = torch.finfo(outputs.dtype).eps
    if (outputs < 0).any() or error > max(_SUM_ERROR, rounding):
        return []
    return [
        f"{search.config.model.name!r} ends in a softmax, and the loss takes another: it hardly "
        "learns; let it return what goes into the softmax"
    ]


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """What brings all tensors of ``model`` back to what they are now."""

    def tensors() -> dict[str, Tensor]:
        return dict(chain(model.named_parameters(), model.named_buffers()))

    before = {name: tensor.detach().clone() for name, tensor in tensors().items()}

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in tensors().items():
                tensor.copy_(before[name])
                tensor.grad = None

    return restore


def _check_gradients(search: Search, batch: Batch, restore: Callable[[], None]) -> None:
    """The gradient at other tensors must be the same put in from outside and loaded.

    It is not where a network, or what it runs again in backward, finds its own tensors by a way
    that :mod:`metapool_kernels.search.training.stateless` does not know.
    """
    search.model.train()
    supernet, layers = search.upper.supernet, search.layers
    weights = supernet.weights()
    alphas = supernet.alphas(layers)
    objective = network_objective(
        supernet.model, list(weights), [supernet.alpha_name(layer) for layer in layers]
    )
    loss_of = search.loss_of(batch)
    others = [(1.0625 * weight.detach()).requires_grad_() for weight in weights.values()]
    tilts = [torch.linspace(0, 1, alpha.shape[-1]).to(alpha) for alpha in alphas]
    tilted = [(a.detach() + tilt).requires_grad_() for a, tilt in zip(alphas, tilts, strict=True)]

    seed_epoch(search.accelerator, search.config.seed, 0)
    loss, _ = with_beside(objective(others, tilted, loss_of))
    put_in = torch.autograd.grad(loss, [*others, *tilted], materialize_grads=True)

    def loaded() -> Sequence[Tensor]:
        restore()
        own = [*weights.values(), *alphas]
        with torch.no_grad():
            for tensor, other in zip(own, (*others, *tilted), strict=True):
                tensor.copy_(other)
        seed_epoch(search.accelerator, search.config.seed, 0)
        for alpha in alphas:
            alpha.requires_grad_()
        with_beside(loss_of(supernet.model))[0].backward()
        for alpha in alphas:
            alpha.requires_grad_(False)
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in own]

    first, again = loaded(), loaded()
    restore()
    for what, part in ("weights", slice(len(others))), ("alphas", slice(len(others), None)):
        error = _difference(put_in[part], first[part])
        # A network that does not repeat itself tells nothing.
        if error > max(LARGEST_ERROR, 10 * _difference(again[part], first[part])):
            raise UserError(
                f"{search.config.model.name!r} holds on to its own tensors where the search puts "
                f"others in their place (the gradient in its {what} is off by {error:.0%}); leave "
                "out what is scripted, kept in objects of your own or recomputed with "
                "use_reentrant=True"
            )


def _difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Between two gradients, as a share of the second."""
    pairs = list(zip(one, other, strict=True))
    distance = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    length = torch.stack([b.norm() for _, b in pairs]).norm()
    return float(distance / length) if length > 0 else float(distance)
