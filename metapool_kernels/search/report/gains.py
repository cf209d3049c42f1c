"""What a search has gained, over which control, and at what cost: in words."""

import math
from collections.abc import Mapping
from statistics import fmean, median, stdev

from scipy.special import stdtrit

from metapool_kernels.search.report.run_figures import in_order, network_name
from metapool_kernels.search.run.controls import meaning
from metapool_kernels.search.run.cost_table import amount
from metapool_kernels.search.run.results import Evaluation, Results
from metapool_kernels.search.run.run_folder import SEARCHED

CHANCE = 0.05
"""How often a difference may be taken for one where there is none."""


def paired_difference(
    one: Mapping[str, float], other: Mapping[str, float]
) -> tuple[float, float | None]:
    """Mean over the common seeds of how much larger ``one`` is, and its standard error.

    None stands for the error of fewer than two seeds.

    Raises:
        ValueError: they have no seed in common.
    """
    differences = [one[seed] - other[seed] for seed in one if seed in other]
    if not differences:
        raise ValueError(f"no seed is both in {list(one)} and in {list(other)}")
    if len(differences) == 1:
        return differences[0], None
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))


def gains(evaluation: Evaluation) -> list[str]:
    """A line for each control: how much better the searched network is, or worse."""
    accuracies = {
        kind: {seed: one.accuracy for seed, one in result.seeds.items()}
        for kind, result in evaluation.networks.items()
    }
    searched = accuracies.pop(SEARCHED, {})
    return [
        f"{_difference(kind, searched, accuracies[kind])} ({meaning(kind)})"
        for kind in in_order(accuracies)
        if searched.keys() & accuracies[kind].keys()
    ]


def _difference(kind: str, searched: Mapping[str, float], other: Mapping[str, float]) -> str:
    difference, error = paired_difference(searched, other)
    spread = "" if error is None else f" ± {error:.2f}"
    direction = "more" if difference >= 0 else "less"
    text = f"{abs(difference):.2f}{spread} points {direction} than {network_name(kind)}"
    return (
        text
        if is_clear(difference, error, len(searched.keys() & other.keys()))
        else (f"{text}, which may be chance")
    )


def is_clear(difference: float, error: float | None, seeds: int) -> bool:
    """Whether Student's t tells a mean difference from none, at the level :data:`CHANCE`."""
    if error is None:
        return False
    return abs(difference) > float(stdtrit(seeds - 1, 1 - CHANCE / 2)) * error


def spread_note(evaluation: Evaluation) -> str:
    """What stands behind ± and "may be chance" in :func:`gains`."""
    seeds = max((len(result.seeds) for result in evaluation.networks.values()), default=0)
    if seeds < 2:
        return "One seed does not tell a difference from chance; adapt.seeds 3 and more may."
    return (
        f"±: standard error of the mean difference over {seeds} seeds of training what one search "
        f"has found, paired by seed, on the same {evaluation.images:,} held-out images."
    )


def costs(results: Results) -> str:
    """What the search took, and what the network takes beside the one without enhancers."""
    return f"{_training_costs(results)}{_device_cost(results.evaluation)}"


def _device_cost(evaluation: Evaluation | None) -> str:
    if evaluation is None or evaluation.cost is None or SEARCHED not in evaluation.networks:
        return ""
    unit, cost = evaluation.cost, evaluation.networks[SEARCHED].cost
    if cost is None:
        return ""
    return (
        f" By the cost table ({unit.target}) it takes {amount(cost, unit.unit)}, "
        f"{cost / unit.skip:.2f} times as much as with skip_connect in every layer."
    )


def _training_costs(results: Results) -> str:
    seconds = sum(row.seconds for row in results.search)
    text = f"The search took {seconds:.0f} s in {len(results.search)} epochs"
    epochs = {
        kind: median(row.seconds for rows in of_kind for row in rows)
        for kind, of_kind in results.training.items()
    }
    networks = results.evaluation.networks if results.evaluation else {}
    if not {SEARCHED, "none"} <= epochs.keys() & networks.keys():
        return f"{text}."
    more = networks[SEARCHED].parameters - networks["none"].parameters
    training = epochs[SEARCHED] * networks[SEARCHED].epochs
    text += (
        f", a training of what it found {training:.0f} s. That network has {more:,} parameters "
        f"more than the one without enhancers, which has {networks['none'].parameters:,}"
    )
    if epochs["none"] == 0:
        return f"{text}."
    return f"{text}, and its epochs took {epochs[SEARCHED] / epochs['none']:.1f} times as long."
