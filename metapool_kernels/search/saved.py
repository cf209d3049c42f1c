"""A search in a folder: what it goes on from, and what it has found."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import nn

import metapool_kernels
from metapool_kernels.search import run_folder
from metapool_kernels.search.architecture import Architecture, Layer, to_json
from metapool_kernels.search.backbone import Backbone
from metapool_kernels.search.config import ModelConfig, SearchConfig
from metapool_kernels.search.cost_table import CostTable
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.json_file import parse_json, to_object
from metapool_kernels.search.page import search_page
from metapool_kernels.search.plots import alpha_figure, heat_map_figure, png
from metapool_kernels.search.pooling_search import PoolingSearch
from metapool_kernels.search.run_folder import Checkpoint, RunFolder
from metapool_kernels.search.supernet import Supernet
from metapool_kernels.search.surgery import Site


@dataclass
class Made:
    """All it takes, beside a network, to make a search again."""

    settings: SearchConfig
    model: ModelConfig
    backbone: Backbone
    sites: list[Site]
    seed: int
    table: CostTable | None


def save(search: PoolingSearch, folder: str | Path) -> None:
    """As :meth:`PoolingSearch.save`, in one process."""
    run = RunFolder(folder)
    made = Made(
        settings=search.settings,
        model=search.supernet.config,
        backbone=search.backbone,
        sites=search.supernet.sites,
        seed=search.seed,
        table=search.table,
    )
    state = {"made": json.dumps(asdict(made)), **search.state_dict()}
    run.save_checkpoint(Checkpoint(search.supernet.model.state_dict(), state), search.epoch)
    run.write_probabilities(search.layers, search.trajectory)
    if search.history:
        run.write_metrics(search.history)
    if not search.stopping.open_layers:
        architecture = found_architecture(search)
        run.write(run_folder.ARCHITECTURE, to_json(architecture))
        figures = {
            run_folder.ALPHA: alpha_figure(architecture, search.trajectory),
            run_folder.HEAT_MAP: heat_map_figure(architecture),
        }
        pictures = {name: png(figure) for name, figure in figures.items()}
        run.write(run_folder.REPORT, search_page(architecture, search.settings, pictures))


def load(folder: str | Path, model: nn.Module) -> PoolingSearch:
    """As :meth:`PoolingSearch.load`."""
    run = RunFolder(folder)
    checkpoint = run.load_checkpoint()
    if checkpoint is None or "made" not in checkpoint.state:
        raise UserError(f"there is no search in {str(folder)!r}; PoolingSearch.save writes one")
    made = to_object(run.path, Made, parse_json(checkpoint.state["made"]))
    with run.restoring():
        search = PoolingSearch.over(
            Supernet(model, made.sites, made.model),
            made.backbone,
            made.settings,
            seed=made.seed,
            table=made.table,
        )
        search.load_state_dict(checkpoint.state)
        model.load_state_dict(checkpoint.weights)
    return search


def found_architecture(search: PoolingSearch) -> Architecture:
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
