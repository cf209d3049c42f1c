"""The stopping rule, on numbers alone."""

import math
from typing import Any

import pytest

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.method.stopping import (
    ProgressiveStopping,
    Stop,
    margin,
    phases,
    ranking,
    relative_entropy,
)
from metapool_kernels.search.settings.config import Keep, Rule, SearchConfig, StopConfig


def rule(
    *layers: str, deadline: int = 100, progressive: bool = True, **settings: Any
) -> ProgressiveStopping:
    config = StopConfig(**{"ema": 0.0, **settings})
    return ProgressiveStopping(layers or ("a",), config, deadline=deadline, progressive=progressive)


def feed(stopping: ProgressiveStopping, epoch: int, **probabilities: list[float]) -> list[Stop]:
    stopping.update(probabilities)
    stops = stopping.check(epoch)
    stopping.fix(stops)
    return stops


@pytest.mark.parametrize("winner", [0, 1, 2])
def test_the_winner_is_the_argmax(winner: int) -> None:
    probabilities = [0.2, 0.2, 0.2]
    probabilities[winner] = 0.6
    stopping = rule(patience=1)
    (stop,) = feed(stopping, 3, a=probabilities)
    assert stop == Stop("a", (winner,), 0.6, pytest.approx(0.4), 3, "margin")


def test_patience_asks_for_leads_in_a_row() -> None:
    stopping = rule(patience=2)
    clear, close = [0.7, 0.3], [0.55, 0.45]
    assert feed(stopping, 1, a=clear) == []
    assert feed(stopping, 2, a=close) == []
    assert feed(stopping, 3, a=clear) == []
    (stop,) = feed(stopping, 4, a=clear)
    assert stop.epoch == 4


def test_patience_asks_for_the_same_leader() -> None:
    stopping = rule(patience=2)
    assert feed(stopping, 1, a=[0.7, 0.3]) == []
    assert feed(stopping, 2, a=[0.3, 0.7]) == []
    (stop,) = feed(stopping, 3, a=[0.3, 0.7])
    assert stop.keep == (1,)


@pytest.mark.parametrize(("second", "stops"), [(0.375, True), (0.376, False)])
def test_a_margin_of_exactly_delta_is_enough(second: float, stops: bool) -> None:
    stopping = rule(delta=0.125, patience=1)
    assert bool(feed(stopping, 1, a=[0.5, second])) is stops


def test_probabilities_are_averaged_from_the_first_on() -> None:
    stopping = rule(ema=0.9)
    stopping.update({"a": [1.0, 0.0]})
    assert stopping.averages["a"] == [1.0, 0.0]
    stopping.update({"a": [0.0, 1.0]})
    assert stopping.averages["a"] == pytest.approx([0.9, 0.1])
    stopping.update({"a": [0.0, 1.0]})
    assert stopping.averages["a"] == pytest.approx([0.81, 0.19])


def test_the_rule_looks_at_the_average_not_at_the_last() -> None:
    stopping = rule(ema=0.9, patience=1)
    stopping.update({"a": [0.5, 0.5]})
    assert feed(stopping, 1, a=[0.0, 1.0]) == []
    for _ in range(10):
        stopping.update({"a": [0.0, 1.0]})
    (stop,) = stopping.check(2)
    assert stop.keep == (1,)


def test_layers_stop_on_their_own() -> None:
    stopping = rule("a", "b", patience=1)
    feed(stopping, 1, a=[0.9, 0.1], b=[0.5, 0.5])
    assert stopping.open_layers == ["b"]
    assert feed(stopping, 2, b=[0.1, 0.9])[0].keep == (1,)
    assert stopping.open_layers == []
    assert stopping.stops["a"].epoch == 1


def test_the_deadline_keeps_the_best_two_best_first() -> None:
    stopping = rule(deadline=2)
    probabilities = [0.3, 0.1, 0.35, 0.25]
    assert feed(stopping, 1, a=probabilities) == []
    (stop,) = feed(stopping, 2, a=probabilities)
    assert stop == Stop("a", (2, 0), 0.35, pytest.approx(0.05), 2, "deadline")


def test_the_margin_goes_before_the_deadline() -> None:
    stopping = rule(deadline=1, patience=1)
    (stop,) = feed(stopping, 1, a=[0.9, 0.1])
    assert (stop.keep, stop.reason) == ((0,), "margin")


def test_nothing_is_decided_before_alpha_has_been_trained() -> None:
    assert rule(deadline=1).check(1) == []


def test_a_restored_rule_goes_on_as_the_first() -> None:
    first = rule("a", "b", patience=2, ema=0.5)
    feed(first, 1, a=[0.9, 0.1], b=[0.6, 0.4])
    feed(first, 2, a=[0.9, 0.1], b=[0.8, 0.2])
    second = rule("a", "b", patience=2, ema=0.5)
    second.load_state_dict(first.state_dict())
    assert [s.layer for s in feed(first, 3, b=[0.9, 0.1])] == ["b"]
    assert [s.layer for s in feed(second, 3, b=[0.9, 0.1])] == ["b"]
    assert first.state_dict() == second.state_dict()


RULES: dict[Rule, tuple[dict[str, Any], list[float], list[float]]] = {
    # settings, probabilities that are enough, probabilities that are just not enough
    "margin": ({"delta": 0.25}, [0.5, 0.25, 0.25], [0.5, 0.26, 0.24]),
    "max_probability": ({"probability": 0.5}, [0.5, 0.25, 0.25], [0.49, 0.26, 0.25]),
    "entropy": ({"entropy": 0.6}, [0.85, 0.1, 0.05], [0.5, 0.4, 0.1]),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_asks_for_what_it_says_in_a_row(name: Rule) -> None:
    settings, enough, too_little = RULES[name]
    stopping = rule(rule=name, patience=2, **settings)
    for epoch, probabilities in enumerate((enough, too_little, enough), 1):
        assert feed(stopping, epoch, a=probabilities) == []
    (stop,) = feed(stopping, 4, a=enough)
    assert (stop.keep, stop.reason, stop.epoch) == ((0,), name, 4)
    assert stop.margin == pytest.approx(enough[0] - enough[1])


def test_the_ranking_rule_asks_for_the_same_order_of_the_best() -> None:
    stopping = rule(rule="stable_ranking", top=2, patience=3)
    orders = ([0.4, 0.3, 0.2, 0.1], [0.4, 0.2, 0.3, 0.1], [0.4, 0.2, 0.3, 0.1])
    for epoch, probabilities in enumerate(orders, 1):
        assert feed(stopping, epoch, a=probabilities) == []
    # The order behind the best two may change.
    (stop,) = feed(stopping, 4, a=[0.4, 0.1, 0.31, 0.19])
    assert (stop.keep, stop.reason) == ((0,), "stable_ranking")


@pytest.mark.parametrize(
    ("keep", "kept", "reason"),
    [("top-2", (2, 0), "deadline"), ("top-1", (2,), "deadline"), ("open", (2,), "end")],
)
def test_what_is_kept_at_the_deadline(keep: Keep, kept: tuple[int, ...], reason: str) -> None:
    stopping = rule(deadline=2, keep=keep)
    probabilities = [0.3, 0.1, 0.35, 0.25]
    assert feed(stopping, 1, a=probabilities) == []
    (stop,) = feed(stopping, 2, a=probabilities)
    assert (stop.keep, stop.reason) == (kept, reason)


def test_without_progressive_stopping_all_wait_for_the_deadline() -> None:
    stopping = rule(patience=1, deadline=3, progressive=False)
    clear = [0.9, 0.1]
    assert [feed(stopping, epoch, a=clear) for epoch in (1, 2)] == [[], []]
    assert feed(stopping, 3, a=clear)[0].reason == "deadline"


def test_what_another_process_has_decided_is_final() -> None:
    stopping = rule("a", "b", patience=1)
    feed(stopping, 1, a=[0.5, 0.5], b=[0.5, 0.5])
    stopping.fix([Stop("b", (1,), 0.6, 0.2, 1, "margin")])
    assert stopping.open_layers == ["a"]


def test_the_warm_up_ends_before_the_deadline() -> None:
    def of(warmup: float, **settings: Any) -> tuple[int, int]:
        return phases(SearchConfig(epochs=10, warmup=warmup, stop=StopConfig(**settings)))

    assert of(0.2, deadline=0.8) == (2, 8)
    assert of(0.7, deadline=0.8) == (7, 8)
    assert of(0.8, deadline=0.8, keep="open") == (8, 10)
    for warmup in (0.8, 0.9):
        with pytest.raises(UserError, match="alpha is never trained"):
            of(warmup, deadline=0.8)
    fixed = SearchConfig(epochs=10, warmup=0.9, train_weights=False, stop=StopConfig(deadline=0.8))
    assert phases(fixed) == (0, 8)


def test_measures_of_probabilities() -> None:
    assert ranking([0.2, 0.4, 0.2, 0.2]) == (1, 0, 2, 3)
    assert margin([0.5, 0.2, 0.3]) == pytest.approx(0.2)
    assert margin([1.0]) == 1
    assert relative_entropy([0.25] * 4) == pytest.approx(1)
    assert relative_entropy([1.0, 0.0]) == relative_entropy([1.0]) == 0
    half = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    assert relative_entropy([0.9, 0.1]) == pytest.approx(half)
