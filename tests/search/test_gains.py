"""What was gained over which control: paired by seed, in words, no more than was measured."""

import json
import math
from pathlib import Path

import pytest

from metapool_kernels.search.report.gains import costs, gains, paired_difference, spread_note
from metapool_kernels.search.report.page import report_page
from metapool_kernels.search.run.controls import meaning
from metapool_kernels.search.run.results import NetworkResult, SeedResult, load_results
from metapool_kernels.search.run.run_folder import RunFolder
from tests.search.run_by_hand import evaluation, write_run


def network(*accuracies: float) -> NetworkResult:
    seeds = {str(i): SeedResult(0, value, 0.0) for i, value in enumerate(accuracies)}
    return NetworkResult("scratch", 8, 1000, seeds, sum(accuracies) / len(accuracies), 0.0)


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by tens of points, and the difference is the same with each."""
    mean, error = paired_difference({"0": 50, "1": 70, "2": 90}, {"0": 48, "1": 68, "2": 88})
    assert mean == pytest.approx(2) and error == pytest.approx(0)
    mean, error = paired_difference({"0": 96, "1": 97, "2": 95}, {"2": 91, "1": 96, "0": 94})
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))  # variance of 2, 1, 4


def test_seeds_that_one_of_them_lacks_do_not_count() -> None:
    assert paired_difference({"0": 10, "1": 20}, {"1": 15, "2": 40}) == (5, None)
    with pytest.raises(ValueError, match="no seed"):
        paired_difference({"0": 10}, {"1": 15})


@pytest.mark.parametrize(
    "searched, control, said",
    [
        ((97.0, 98.0), (90.0, 91.5), "6.75 ± 0.25 points more than without enhancers ("),
        ((90.0, 91.5), (97.0, 98.0), "6.75 ± 0.25 points less than without enhancers ("),
        # Two standard errors are no difference with two seeds: Student's t asks for 12.7.
        ((97.0, 98.0), (90.0, 96.5), "4.25 ± 2.75 points more than without enhancers, which may"),
        (
            (97.0, 98.0, 97.5),
            (95.0, 95.5, 96.2),
            "1.93 ± 0.35 points more than without enhancers (",
        ),
        (
            (97.0, 98.0, 97.5),
            (95.0, 96.5, 97.2),
            "1.27 ± 0.50 points more than without enhancers, w",
        ),
        ((97.0,), (98.0,), "1.00 points less than without enhancers, which may be chance"),
    ],
)
def test_lines(
    searched: tuple[float, ...], control: tuple[float, ...], said: str, tmp_path: Path
) -> None:
    results = load_results(RunFolder(write_run(tmp_path / "run", evaluation())))
    assert results.evaluation is not None
    results.evaluation.networks = {"none": network(*control), "searched": network(*searched)}
    (line,) = gains(results.evaluation)
    assert line.startswith(said) and line.endswith(f"({meaning('none')})")
    assert ("One seed" in spread_note(results.evaluation)) is (len(searched) == 1)


def test_the_report_begins_with_gain_and_cost(tmp_path: Path) -> None:
    results = load_results(RunFolder(write_run(tmp_path / "run", evaluation())))
    text = report_page(results, {})
    first = text[: text.index("Comparison with controls")]
    assert "names 96.88 ± 0.88 % of 400 held-out images correctly" in first
    assert "1.75 ± 0.25 points more than without enhancers" in first
    assert "0.62 ± 0.37 points more than uniform mix, which may be chance" in first
    cost = costs(results)
    assert "The search took 35 s in 4 epochs" in cost and "12,234 parameters more" in cost
    assert "1.0 times as long" in cost and cost in first
    for of_kind in results.training["none"]:
        for row in of_kind:
            row.seconds = 0.0
    assert costs(results).endswith("which has 111,222.")


def test_before_an_evaluation_it_tells_the_time_alone(tmp_path: Path) -> None:
    results = load_results(RunFolder(write_run(tmp_path / "run")))
    assert costs(results) == "The search took 35 s in 4 epochs."
    assert "points" not in report_page(results, {})


def test_evaluations_of_before_are_still_read(tmp_path: Path) -> None:
    """Without a seed of the searched network there is nothing to compare."""
    found = evaluation()
    del found["networks"]["searched"]
    run = write_run(tmp_path / "run", json.loads(json.dumps(found)))
    results = load_results(RunFolder(run))
    assert results.evaluation is not None and gains(results.evaluation) == []
    assert "points more" not in report_page(results, {})
