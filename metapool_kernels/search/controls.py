"""What a searched network is compared with: other choices in the same places."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from metapool_kernels.search.architecture import Architecture, Layer
from metapool_kernels.search.config import Control
from metapool_kernels.search.derive import derive
from metapool_kernels.search.run_folder import SEARCHED


def build_network(name: str, architecture: Architecture, seed: int) -> nn.Module:
    """``searched`` or a control, with initial weights that depend on ``seed`` alone.

    Raises:
        UserError: the backbone has no such layers.
    """
    if name == "none":
        return architecture.backbone.build(seed)
    if name == "random":
        architecture = random_choices(architecture, seed)
    elif name == "uniform":
        architecture = uniform_mixture(architecture)
    return derive(architecture, seed)


def network_names(controls: Sequence[Control]) -> list[str]:
    """The searched network and its controls, each once."""
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
