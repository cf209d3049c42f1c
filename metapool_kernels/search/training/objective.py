"""The loss of a network as a function of its weights and alphas."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from metapool_kernels.search.method.bilevel import Objective, with_beside
from metapool_kernels.search.training.stateless import Stateless

NetworkLoss = Callable[[nn.Module], Tensor | tuple[Tensor, Any]]
"""The loss of a network on a batch that it brings along; anything else may stand beside it."""


def network_objective(
    model: nn.Module, weight_names: Sequence[str], alpha_names: Sequence[str]
) -> Objective:
    """The loss of ``model``, in its present mode; its batches are each a :data:`NetworkLoss`.

    What is called gets a network of the same structure that computes with other tensors.
    Normalisation layers in training mode use the statistics of the batch; these, as every other
    change of a buffer, go into copies and are forgotten.
    """
    parameters = dict(model.named_parameters())
    moved = [parameters[name] for name in (*weight_names, *alpha_names)]
    buffers = list(model.buffers())
    stateless = Stateless(model)

    def objective(
        weights: Sequence[Tensor], alphas: Sequence[Tensor], loss: NetworkLoss
    ) -> Tensor | tuple[Tensor, Any]:
        put = {id(buffer): buffer.clone() for buffer in buffers}
        put |= {id(own): tensor for own, tensor in zip(moved, (*weights, *alphas), strict=True)}
        return loss(stateless.with_tensors(put))

    return objective


def scaled(loss: NetworkLoss, scale: float) -> NetworkLoss:
    """The same loss so many times as large, so that no gradient of it vanishes in float16."""

    def larger(network: nn.Module) -> tuple[Tensor, Any]:
        value, beside = with_beside(loss(network))
        return value * scale, beside

    return loss if scale == 1 else larger


@contextmanager
def explained() -> Iterator[None]:
    """Around derivatives of a loss of the user's.

    Raises:
        ValueError: it does not depend on alpha, having been computed with another network.
    """
    try:
        yield
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error):
            raise
        raise ValueError(
            "a loss does not depend on alpha: compute it with the network that it is called with, "
            f"as in lambda net: loss(net(x), y) ({error})"
        ) from error
