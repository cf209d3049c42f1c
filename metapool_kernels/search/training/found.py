"""What a search has found, for ``architecture.json``."""

import timm
import torch

import metapool_kernels
from metapool_kernels.search.networks.architecture import Architecture, Layer
from metapool_kernels.search.training.upper_level import UpperLevel


def found_architecture(search: UpperLevel) -> Architecture:
    """What has been found; every layer must have stopped."""
    supernet = search.supernet
    layers = []
    for site in supernet.sites:
        stop = search.stopping.stops[site.name]
        layers.append(
            Layer(
                name=site.name,
                channels=site.channels,
                map_size=site.map_size,
                choice=supernet.choice(site.name),
                weights=supernet.choice_weights(site.name),
                alpha=search.stopped_alphas[site.name],
                probability=stop.probability,
                margin=stop.margin,
                epoch=stop.epoch,
                reason=stop.reason,
                importances=list(stop.importances),
            )
        )
    config = supernet.config
    return Architecture(
        backbone=search.backbone,
        insert_after=config.insert_after,
        insert_after_type=config.insert_after_type,
        candidates=config.candidates,
        extra_candidates=list(config.extra_candidates),
        count_include_pad=config.count_include_pad,
        candidate_norm=config.candidate_norm,
        layers=layers,
        seed=search.seed,
        versions={
            "metapool_kernels": metapool_kernels.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    )
