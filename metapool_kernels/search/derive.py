"""The network that a search has found."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metapool_kernels import SpatialEnhancer
from metapool_kernels.search.architecture import Architecture
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.supernet import meta_pool
from metapool_kernels.search.surgery import Site, insert_enhancers


def derive(
    architecture: Architecture, seed: int, supernet_weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build the network: each enhancer with its choice alone, the weights of a mixture fixed.

    A single choice becomes plain ``torch.nn`` pooling; mixtures keep the fused op.

    Args:
        architecture: what to build.
        seed: the initial weights depend on it alone.
        supernet_weights: tensors to begin with, from the end of the search.

    Raises:
        UserError: the backbone has no such layers, or the weights do not fit.
    """
    model = architecture.backbone.build(seed)
    enhancers: dict[str, SpatialEnhancer] = {}
    for layer in architecture.layers:
        site = Site(layer.name, layer.channels, layer.map_size)
        try:
            enhancers |= insert_enhancers(
                model, [site], layer.choice, count_include_pad=architecture.count_include_pad
            )
        except AttributeError as error:
            raise UserError(
                f"{architecture.backbone.name!r} has no module {layer.name!r}"
            ) from error
        alpha = meta_pool(enhancers[layer.name]).alpha.requires_grad_(False)
        alpha.copy_(torch.tensor(layer.weights).log())
    if supernet_weights is not None:
        try:
            model.load_state_dict(supernet_weights)
        except RuntimeError as error:
            raise UserError(f"the searched weights do not fit the architecture: {error}") from error
    for layer in architecture.layers:
        if len(layer.choice) == 1:
            model.set_submodule(f"{layer.name}.enhancer", enhancers[layer.name].to_torch())
    return model.to(memory_format=torch.channels_last)
