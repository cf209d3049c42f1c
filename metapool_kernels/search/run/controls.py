"""What a searched network is compared with: other choices in the same places."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from metapool_kernels.candidates import parse_candidate
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.architecture import Architecture, Layer
from metapool_kernels.search.networks.derive import derive
from metapool_kernels.search.run.cost_table import CostTable
from metapool_kernels.search.run.results import INHERITED
from metapool_kernels.search.run.run_folder import SEARCHED, RunFolder
from metapool_kernels.search.settings.config import Control

FIXED = "fixed:"
"""Before the candidate that such a control has in each layer."""

_MEANINGS = {
    SEARCHED: "what the search has chosen",
    INHERITED: "what training brings beyond the weights of the search",
    "none": "all that enhancers and search bring",
    "skip": "what pooling brings beyond BatchNorm and Hardswish",
    "random": "what choosing brings over chance",
    "uniform": "what choosing brings over a mix, which takes the time of all candidates",
    FIXED: "what choosing by layer brings over one pooling everywhere",
}


def meaning(name: str) -> str:
    """What the searched network shows beside this one; "" for one that is not known."""
    return _MEANINGS.get(FIXED if name.startswith(FIXED) else name, "")


def build_network(
    name: str, architecture: Architecture, seed: int, initial: str | None = None
) -> nn.Module:
    """``searched`` or a control, as training from scratch begins with it.

    Args:
        name: of the network.
        architecture: what was found.
        seed: what is drawn depends on it alone.
        initial: file with weights for the network without enhancers to begin with.

    Raises:
        UserError: the backbone has no such layers, or the weights do not fit.
    """
    if name == "none":
        network = architecture.backbone.build(seed)
        if initial is not None:
            architecture.backbone.load_initial_weights(network, initial)
        return network
    return derive(_with_choices(name, architecture, seed), seed, initial=initial)


def network_cost(
    name: str, architecture: Architecture, seed: int, table: CostTable
) -> float | None:
    """What ``searched`` or a control costs by a table, if it has all that it takes."""
    if name == "none":
        return table.none
    layers = _with_choices(name, architecture, seed).layers
    return table.network({layer.name: layer.choice for layer in layers})


def _with_choices(name: str, architecture: Architecture, seed: int) -> Architecture:
    """The architecture of ``searched``, or with the choices of a control in its place."""
    if name == SEARCHED:
        return architecture
    if name == "random":
        return random_choices(architecture, seed)
    if name == "uniform":
        return uniform_mixture(architecture)
    candidate = "skip_connect" if name == "skip" else name.removeprefix(FIXED)
    return _chosen(architecture, [[candidate]] * len(architecture.layers))


def load_network(name: str, architecture: Architecture, seed: int, trained: RunFolder) -> nn.Module:
    """``searched`` or a control, with the weights that training has left.

    Raises:
        UserError: it has not been trained, or the weights are those of another network.
    """
    tensors = trained.load_weights()
    network = build_network(name, architecture, seed)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"the weights in {str(trained.path)!r} are not those of the network {name}: {error}; "
            "adapt again"
        ) from error
    return network


def network_names(controls: Sequence[Control]) -> list[str]:
    """The searched network and its controls, each once.

    Raises:
        UserError: it would be shown without what it has to be compared with, or a fixed candidate
            is none.
    """
    for name in controls:
        if name.startswith(FIXED):
            try:
                parse_candidate(name.removeprefix(FIXED))
            except ValueError as error:
                raise UserError(f"adapt.controls has {name!r}: {error}") from error
    missing = {"none", "random"} - set(controls)
    if missing:
        raise UserError(
            f"adapt.controls lacks {' and '.join(sorted(missing))}; what a search finds means "
            "nothing without them"
        )
    return list(dict.fromkeys([SEARCHED, *controls]))


def random_choices(architecture: Architecture, seed: int) -> Architecture:
    """One candidate for each layer, all equally likely, drawn with ``seed``."""
    names = [*architecture.candidates, *architecture.extra_candidates]
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(names), size=len(architecture.layers))
    return _chosen(architecture, [[names[k]] for k in drawn])


def uniform_mixture(architecture: Architecture) -> Architecture:
    """All candidates in each layer, with equal weights that stay."""
    names = [*architecture.candidates, *architecture.extra_candidates]
    return _chosen(architecture, [names] * len(architecture.layers))


def _chosen(architecture: Architecture, choices: Sequence[Sequence[str]]) -> Architecture:
    layers: list[Layer] = [
        replace(layer, choice=list(choice), weights=[1 / len(choice)] * len(choice))
        for layer, choice in zip(architecture.layers, choices, strict=True)
    ]
    return replace(architecture, layers=layers)
