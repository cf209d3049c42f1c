"""What a search has gained, over which control, and at what cost: in words."""

import math
from statistics import fmean, stdev

from metapool_kernels.search.controls import meaning
from metapool_kernels.search.curves import in_order, network_name
from metapool_kernels.search.results import Evaluation, NetworkResult, Results
from metapool_kernels.search.run_folder import SEARCHED

CLEAR = 2.0
"""Standard errors from which on a difference is called one."""


def paired_difference(one: NetworkResult, other: NetworkResult) -> tuple[float, float | None]:
    """Mean over the common seeds of how much more accurate ``one`` is, and its standard error.

    In points of percent; None where there are fewer than two seeds.
    """
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    differences = [one.seeds[seed].accuracy - other.seeds[seed].accuracy for seed in seeds]
    if len(differences) < 2:
        return fmean(differences) if differences else one.mean - other.mean, None
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))


def gains(evaluation: Evaluation) -> list[str]:
    """A line for each control: how much better the searched network is, or worse."""
    networks = evaluation.networks
    if SEARCHED not in networks:
        return []
    return [
        f"{_points(*paired_difference(networks[SEARCHED], networks[kind]))} {network_name(kind)} "
        f"({meaning(kind)})"
        for kind in in_order(networks)
        if kind != SEARCHED
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
