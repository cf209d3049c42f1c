"""A search in a folder: what it goes on from, and what it has found."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.files.json_file import parse_json, to_object
from metapool_kernels.search.networks.architecture import to_json
from metapool_kernels.search.networks.backbone import Backbone
from metapool_kernels.search.networks.supernet import Supernet
from metapool_kernels.search.networks.surgery import Site
from metapool_kernels.search.report.choice_figures import alpha_figure, heat_map_figure, png
from metapool_kernels.search.report.page import search_page
from metapool_kernels.search.run import run_folder
from metapool_kernels.search.run.cost_table import CostTable
from metapool_kernels.search.run.run_folder import Checkpoint, RunFolder
from metapool_kernels.search.settings.config import ModelConfig, SearchConfig
from metapool_kernels.search.training.found import found_architecture
from metapool_kernels.search.training.upper_level import UpperLevel


@dataclass
class Made:
    """All it takes, beside a network, to make a search again."""

    settings: SearchConfig
    model: ModelConfig
    backbone: Backbone
    sites: list[Site]
    seed: int
    table: CostTable | None


def save(search: UpperLevel, folder: str | Path) -> None:
    """As :meth:`PoolingSearch.save`, in the process that writes."""
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


def begin_again(search: UpperLevel, folder: str | Path, model: nn.Module) -> None:
    """Make a search, not yet initialised, that which was saved, as :meth:`PoolingSearch.load`."""
    run = RunFolder(folder)
    checkpoint = run.load_checkpoint()
    if checkpoint is None or "made" not in checkpoint.state:
        raise UserError(f"there is no search in {str(folder)!r}; PoolingSearch.save writes one")
    made = to_object(run.path, Made, parse_json(checkpoint.state["made"]))
    with run.restoring():
        supernet = Supernet(model, made.sites, made.model)
        UpperLevel.__init__(
            search, supernet, made.backbone, made.settings, seed=made.seed, table=made.table
        )
        search.load_state_dict(checkpoint.state)
        model.load_state_dict(checkpoint.weights)
