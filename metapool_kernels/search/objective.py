"""The loss of a network as a function of its weights and alphas, for :mod:`bilevel`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from metapool_kernels.search.bilevel import Objective
from metapool_kernels.search.stateless import Stateless

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
