"""The network that is left when every enhancer has made its choice."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metapool_kernels import MetaPool2d, SpatialEnhancer
from metapool_kernels.convertible import to_plain
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.architecture import Architecture, Layer
from metapool_kernels.search.networks.attention import EXTRA_CANDIDATES
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.supernet import ALPHA, meta_pool
from metapool_kernels.search.networks.surgery import insert_enhancer


def derive(
    architecture: Architecture,
    seed: int,
    supernet_weights: Mapping[str, Tensor] | None = None,
    *,
    initial: str | None = None,
) -> nn.Module:
    """Build the network: each enhancer with its choice alone, the weights of a mixture fixed.

    Poolings run by the fused op, a single one too, for training;
    :func:`metapool_kernels.convertible.to_plain` turns them into plain ``torch.nn`` modules.

    Args:
        architecture: what to build.
        seed: what is drawn depends on it alone.
        supernet_weights: tensors to begin with, from the end of the search; the weights of the
            mixtures are those of ``architecture``.
        initial: file with weights for the network without enhancers to begin with.

    Raises:
        UserError: the backbone has no such layers or does not run with them, or the weights do
            not fit.
    """
    model = architecture.backbone.build(seed)
    if initial is not None:
        architecture.backbone.load_initial_weights(model, initial)
    for layer in architecture.layers:
        _insert(model, architecture, layer)
    if supernet_weights is not None:
        alphas = {
            name: tensor for name, tensor in model.state_dict().items() if name.endswith(ALPHA)
        }
        try:
            model.load_state_dict({**supernet_weights, **alphas})
        except RuntimeError as error:
            raise UserError(f"the searched weights do not fit the architecture: {error}") from error
    _try(model, architecture.backbone)
    return model.to(memory_format=torch.channels_last)


def _insert(model: nn.Module, architecture: Architecture, layer: Layer) -> None:
    # As MetaPool2d has them: the poolings first.
    pairs = sorted(
        zip(layer.choice, layer.weights, strict=True), key=lambda pair: _is_extra(pair[0])
    )
    try:
        enhancer = insert_enhancer(
            model,
            layer.name,
            layer.channels,
            [name for name, _ in pairs if not _is_extra(name)],
            extra_candidates=[name for name, _ in pairs if _is_extra(name)],
            count_include_pad=architecture.count_include_pad,
            candidate_norm=architecture.candidate_norm,
        )
    except AttributeError as error:
        raise UserError(f"{architecture.backbone.name!r} has no module {layer.name!r}") from error
    alpha = meta_pool(enhancer).alpha.requires_grad_(False)
    alpha.copy_(torch.tensor([weight for _, weight in pairs]).log())


def _try(model: nn.Module, backbone: Backbone) -> None:
    """Run the network once, so that what does not fit is noticed here."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *backbone.image_shape))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{backbone.name!r} does not run with the enhancers of its architecture: {error}"
        ) from error
    finally:
        model.train(training)


def _is_extra(candidate: str) -> bool:
    return candidate in EXTRA_CANDIDATES


def derive_network(model: nn.Module, keep: int = 1) -> nn.Module:
    """A copy of ``model`` in which every enhancer keeps its best candidates, with fixed weights.

    Args:
        model: any network with enhancers, such as
            :func:`metapool_kernels.search.networks.surgery.add_enhancers` makes; stays as it is.
        keep: how many candidates each enhancer keeps: those of the largest weights, averaged over
            the channels where each channel has its own, without the sign where there is one.
            Under softmax their weights sum to one again.

    Returns:
        A network of plain torch modules: a single candidate is a ``torch.nn`` pooling, a wide
        one two, or the extra candidate itself; several are a
        :class:`metapool_kernels.plain.WeightedSum` of such.
        What a subclass computes by a forward of its own it goes on to compute: see
        :func:`metapool_kernels.convertible.to_plain`.

    Raises:
        ValueError: ``keep`` is less than one, or ``model`` has no enhancer.
    """
    if keep < 1:
        raise ValueError(f"keep should be at least 1, got {keep}")
    derived = copy.deepcopy(model)
    enhancers = [
        module
        for module in derived.modules()
        if isinstance(module, SpatialEnhancer) and isinstance(module.pool, MetaPool2d)
    ]
    if not enhancers:
        raise ValueError("the network has no enhancer; add_enhancers puts some in")
    for enhancer in enhancers:
        weights = meta_pool(enhancer).weights().detach().abs()
        best = weights.reshape(-1, weights.shape[-1]).mean(0).argsort(descending=True, stable=True)
        enhancer.reduce(best[:keep].tolist())
    return to_plain(derived)
