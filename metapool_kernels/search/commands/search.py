"""``metapool search``: everything around the loop."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from metapool_kernels.search.commands.plot import draw
from metapool_kernels.search.data import planted
from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.data.inspection import load_inspected
from metapool_kernels.search.data.splits import split_data, split_warnings
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.collective import on_main
from metapool_kernels.search.machine.console import warn
from metapool_kernels.search.machine.processes import make_accelerator
from metapool_kernels.search.networks.architecture import to_json
from metapool_kernels.search.networks.backbone import TEACHER, make_backbone
from metapool_kernels.search.networks.supernet import find_backbone_sites
from metapool_kernels.search.networks.surgery import site_table
from metapool_kernels.search.report.choices import choice_warnings, layer_table
from metapool_kernels.search.run import run_folder
from metapool_kernels.search.run.cost_table import FORMAT as COSTS
from metapool_kernels.search.run.cost_table import load_table
from metapool_kernels.search.run.run_folder import RunFolder
from metapool_kernels.search.settings.config import Config
from metapool_kernels.search.training.first_step import check_first_step
from metapool_kernels.search.training.found import found_architecture
from metapool_kernels.search.training.loop import Search

SETTINGS = ("seed", "threads", "precision", "data", "model", "search")
"""The fields of the configuration that a search depends on."""


def run_search(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Search, from the start or from the last finished epoch, and write the run folder.

    Raises:
        UserError: something in the configuration, the data or the folder does not work; nothing
            has been overwritten then.
    """
    accelerator = make_accelerator(config)
    run = RunFolder(config.output)
    if resume:
        on_main(lambda: run.check_settings(config, SETTINGS))
    data = load_inspected(config, accelerator)
    split = split_data(data, config.search.alpha_half, config.seed)
    if resume and (run / run_folder.SPLIT).exists():
        split = run.load_split()
        split.check(data)
    backbone = make_backbone(config.model, data.image_shape, len(data.classes))
    own = run / run_folder.COST
    table = COSTS.load(own) if resume and own.exists() else load_table(config.search.cost)
    search = Search(config, backbone, data, split, accelerator, initial_tensors(config), table)
    doubts = check_first_step(search)

    def begin() -> None:
        run.begin(config, SETTINGS, resume=resume, overwrite=overwrite)
        run.write(run_folder.SPLIT, json.dumps(asdict(split)) + "\n")
        if table is not None:
            run.write(run_folder.COST, COSTS.to_json(table))
        warn([*split_warnings(data, split), *doubts])

    on_main(begin)
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        with run.restoring():
            search.restore(checkpoint)
    search.train(run)

    def finish() -> None:
        architecture = found_architecture(search.upper)
        for layer in architecture.layers:
            search.upper.supernet.settle(layer.name)
        run.write_weights(run_folder.WEIGHTS, search.upper.supernet.model.state_dict())
        run.write(run_folder.ARCHITECTURE, to_json(architecture))
        print(layer_table(architecture))
        warn(choice_warnings(architecture))
        warn([] if search.upper.cost is None else search.upper.cost.warnings())
        draw(run)
        print(f"report: {run / run_folder.REPORT}")

    on_main(finish)


def run_dry(config: Config) -> None:
    """Print where the enhancers would go; write nothing.

    Raises:
        UserError: the model, the data or the pattern does not work.
    """
    data = load_data(config)
    backbone = make_backbone(config.model, data.image_shape, len(data.classes))
    print(site_table(find_backbone_sites(backbone, backbone.build(config.seed), config.model)))


def initial_tensors(config: Config) -> Mapping[str, Tensor] | None:
    """What the supernet begins with, if not with weights drawn at random.

    Raises:
        UserError: the teacher of a problem that has none.
    """
    if config.model.weights != TEACHER:
        return None
    if config.data.kind != "planted":
        raise UserError(
            f"model.weights is teacher, and data.kind {config.data.kind!r} has none; "
            "give a file, or data.kind planted"
        )
    return planted.teacher_state(config)
