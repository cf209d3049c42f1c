"""``architecture.json``: what a search has found, and all it takes to build it again."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from metapool_kernels.candidates import parse_candidates
from metapool_kernels.search.files.json_file import Format
from metapool_kernels.search.method.stopping import Reason
from metapool_kernels.search.networks.attention import EXTRA_CANDIDATES
from metapool_kernels.search.networks.backbone import Backbone


@dataclass
class Layer:
    """What became of one layer.

    Args:
        name: of the module that the enhancer follows.
        channels: of the maps there.
        map_size: height and width of the maps there, in pixels.
        choice: the candidates that stay, best first.
        weights: one for each choice; they sum to 1.
        alpha: architecture parameters when the layer stopped, one for each candidate, the extra
            ones last.
        probability: averaged probability of the best when the layer stopped.
        margin: its lead over the others; negative if the perturbation rule chose another than the
            most probable.
        epoch: at whose end the layer stopped, from 1.
        reason: which rule stopped it.
        importances: of the perturbation rule, by how much the loss on the alpha half rose without
            each candidate.
    """

    name: str
    channels: int
    map_size: tuple[int, int]
    choice: list[str]
    weights: list[float]
    alpha: list[float]
    probability: float
    margin: float
    epoch: int
    reason: Reason
    importances: list[float] = field(default_factory=list)


@dataclass
class Architecture:
    """The result of a search.

    Args:
        backbone: the network without enhancers.
        insert_after: the pattern that the layers' names match.
        candidates: the poolings that each layer chose from.
        count_include_pad: whether the padding counts in the divisor of an average.
        layers: one for each enhancer.
        seed: of the search.
        versions: of the libraries that the search ran with.
        extra_candidates: what each layer chose from beside the poolings.
        insert_after_type: the class that these modules have, if it was asked for.
        candidate_norm: whether each pooling is normalised before it is weighted.
    """

    backbone: Backbone
    insert_after: str
    candidates: list[str]
    count_include_pad: bool
    layers: list[Layer]
    seed: int
    versions: dict[str, str]
    extra_candidates: list[str] = field(default_factory=list)
    insert_after_type: str | None = None
    candidate_norm: bool = False


def _check(architecture: Architecture) -> None:
    parse_candidates(architecture.candidates)
    unknown = set(architecture.extra_candidates) - set(EXTRA_CANDIDATES)
    if unknown:
        raise ValueError(f"unknown extra candidates {sorted(unknown)}")
    candidates = {*architecture.candidates, *architecture.extra_candidates}
    if not isinstance(architecture.candidate_norm, bool):  # null passes where there is a default
        raise ValueError(f"candidate_norm is {architecture.candidate_norm!r}, no true or false")
    if not 0 <= architecture.seed < 2**63:
        raise ValueError("the seed should be from 0 to 2**63 - 1")
    if min(architecture.backbone.image_shape) < 1:
        raise ValueError(f"images of shape {architecture.backbone.image_shape}")
    names = [layer.name for layer in architecture.layers]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"layers should have different names, got {names}")
    for layer in architecture.layers:
        if min(layer.channels, *layer.map_size, layer.epoch) < 1:
            raise ValueError(f"layer {layer.name!r} has a size or an epoch below 1")
        numbers = (*layer.alpha, *layer.importances, layer.probability, layer.margin)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"layer {layer.name!r} has a number that is not finite")
        if not set(layer.choice).isdisjoint(EXTRA_CANDIDATES) and len(set(layer.choice)) < len(
            layer.choice
        ):
            raise ValueError(f"layer {layer.name!r} chose {layer.choice}, one of them twice")
        strangers = set(layer.choice) - candidates
        if strangers or not layer.choice:
            raise ValueError(f"layer {layer.name!r} chose {layer.choice}, not from the candidates")
        fits = len(layer.weights) == len(layer.choice) and min(layer.weights) > 0
        if not fits or not math.isclose(sum(layer.weights), 1, rel_tol=1e-4):
            raise ValueError(f"layer {layer.name!r} has weights {layer.weights} for its choice")


_FORMAT = Format(
    kind=Architecture,
    name="metapool-architecture",
    version=1,
    what="an architecture file of metapool search",
    origin="run 'metapool search' to its end",
    check=_check,
)


def to_json(architecture: Architecture) -> str:
    """The content of ``architecture.json``."""
    return _FORMAT.to_json(architecture)


def load_architecture(path: Path) -> Architecture:
    """Read ``architecture.json``.

    Raises:
        UserError: there is none, it is cut off, not such a file, from a newer version, or holds
            something that cannot be.
    """
    return _FORMAT.load(path)
