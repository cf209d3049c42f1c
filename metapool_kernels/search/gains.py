"""What a search has gained, over which control, and at what cost: in words."""

import math
from collections.abc import Mapping
from statistics import fmean, stdev

from metapool_kernels.search.controls import meaning
from metapool_kernels.search.curves import in_order, network_name
from metapool_kernels.search.results import Evaluation, Results
from metapool_kernels.search.run_folder import SEARCHED

CLEAR = 2.0
"""Standard errors from which on a difference is called one."""


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
        f"{_points(*paired_difference(searched, accuracies[kind]))} {network_name(kind)} "
        f"({meaning(kind)})"
        for kind in in_order(accuracies)
        if searched.keys() & accuracies[kind].keys()
    ]


def _points(difference: float, error: float | None) -> str:
    spread = "" if error is None else f" ± {error:.2f}"
    text = f"{abs(difference):.2f}{spread} points {'more' if difference >= 0 else 'less'} than"
    clear = error is None or abs(difference) > CLEAR * error
    return text if clear else f"no clear difference, {text}"


def spread_note(evaluation: Evaluation) -> str:
    """What stands behind ± in :func:`gains`."""
    seeds = max((len(result.seeds) for result in evaluation.networks.values()), default=0)
    if seeds < 2:
        return "One seed tells no spread; adapt.seeds 3 and more do."
    return f"±: standard error of the mean difference over {seeds} seeds, paired by seed."


def costs(results: Results) -> str:
    """What the search took, and what the network takes beside the one without enhancers."""
    seconds = sum(row.seconds for row in results.search)
    text = f"The search took {seconds:.0f} s in {len(results.search)} epochs"
    epochs = {
        kind: fmean(row.seconds for rows in of_kind for row in rows)
        for kind, of_kind in results.training.items()
    }
    networks = results.evaluation.networks if results.evaluation else {}
    if not {SEARCHED, "none"} <= epochs.keys() & networks.keys():
        return f"{text}."
    more = networks[SEARCHED].parameters - networks["none"].parameters
    training = epochs[SEARCHED] * networks[SEARCHED].epochs
    return (
        f"{text}, a training of what it found {training:.0f} s. That network has {more:,} "
        f"parameters more than the one without enhancers, which has "
        f"{networks['none'].parameters:,}, and an epoch of its training takes "
        f"{epochs[SEARCHED] / epochs['none']:.1f} times as long."
    )
