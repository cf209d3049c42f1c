"""``metapool plot``: the pictures and the report of a finished search."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from metapool_kernels.search.networks.architecture import Architecture
from metapool_kernels.search.networks.derive import derive
from metapool_kernels.search.networks.receptive_field import receptive_fields
from metapool_kernels.search.report.choice_figures import (
    alpha_figure,
    heat_map_figure,
    png,
    receptive_field_figure,
)
from metapool_kernels.search.report.front_figure import front_figure
from metapool_kernels.search.report.page import report_page
from metapool_kernels.search.report.run_figures import (
    controls_figure,
    cost_figure,
    step_time_figure,
    training_figure,
)
from metapool_kernels.search.run.results import Results, load_results
from metapool_kernels.search.run.run_folder import (
    ALPHA,
    CONTROLS,
    COSTS,
    FRONT,
    HEAT_MAP,
    RECEPTIVE_FIELD,
    REPORT,
    STEP_TIME,
    TRAINING,
    RunFolder,
)
from metapool_kernels.search.settings.config import Config


def run_plot(config: Config, *, beside: Sequence[str] = ()) -> None:
    """Draw what the folder ``config.output`` holds and print which files that made.

    Args:
        config: the settings.
        beside: folders of other evaluated runs, whose searched networks :data:`FRONT` shows too.

    Raises:
        UserError: a folder holds no finished search, or a damaged file, or costs of another kind.
    """
    run = RunFolder(config.output)
    for name in draw(run, [load_results(RunFolder(folder)) for folder in beside]):
        print(run / name)


def draw(run: RunFolder, beside: Sequence[Results] = ()) -> list[str]:
    """Write the pictures and the report into a run folder. Needs no images.

    Args:
        run: the folder.
        beside: other runs, for :data:`FRONT`.

    Returns:
        The names of the files.

    Raises:
        UserError: the folder holds no finished search, or a damaged file, or cannot be written.
    """
    results = load_results(run)
    architecture = results.architecture
    figures: dict[str, Figure] = {
        ALPHA: alpha_figure(architecture, results.probabilities.epochs),
        HEAT_MAP: heat_map_figure(architecture),
        RECEPTIVE_FIELD: _receptive_fields(architecture),
        STEP_TIME: step_time_figure(results.search, len(architecture.layers)),
        TRAINING: training_figure(results.search, results.training),
    }
    if results.evaluation is not None:
        figures[CONTROLS] = controls_figure(results.evaluation)
    if results.search[-1].expected_cost is not None:
        figures[COSTS] = cost_figure(results.search)
    if beside or (results.evaluation is not None and results.evaluation.cost is not None):
        figures[FRONT] = front_figure(results, beside)
    pictures = {name: png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        run.write(name, picture)
    run.write(REPORT, report_page(results, pictures))
    return [*pictures, REPORT]


def _receptive_fields(architecture: Architecture) -> Figure:
    sites = [layer.name for layer in architecture.layers]
    shape = architecture.backbone.image_shape
    # Large images show their fields by themselves, and enlarging them would take minutes.
    least = min(4 * max(shape[1:]), 128)
    # Building a network draws its weights; whoever draws pictures wants no other random numbers.
    with torch.random.fork_rng(devices=[]):
        searched = receptive_fields(derive(architecture, architecture.seed), sites, shape, least)
        plain = receptive_fields(
            architecture.backbone.build(architecture.seed), sites, shape, least
        )
    return receptive_field_figure(architecture, searched, plain)
