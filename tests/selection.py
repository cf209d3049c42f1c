"""What `make test` runs of all tests, and what it leaves to `make test-rest`.

Of each test function so many cases run that every value of every parameter occurs, and with every
compiled backend; of a parameter that is a :class:`tests.cases.Case`, or another dataclass, every
value of every field. What is left out repeats these values in other combinations. Tests marked
``costly`` are left out as a whole.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

PARTS = ("quick", "rest")
"""Together they are all tests, and none is in both."""

COSTLY = "costly"
"""The marker of tests that the quick part does not have; a cheaper one shows much of the same."""

COMPILED = ("cpu", "triton", "cuda")
"""The backends with kernels; the reference is the definition, in plain PyTorch."""

Feature = Hashable


COLLECTED = pytest.StashKey[list[pytest.Item]]()
"""All tests of a session, those of the other part too."""


def part(items: Sequence[Any], name: str) -> list[Any]:
    """The tests of one of PARTS, in their order."""
    quick = {id(item) for item in _quick(items)}
    return [item for item in items if (id(item) in quick) == (name == "quick")]


def _quick(items: Sequence[Any]) -> Iterator[Any]:
    functions: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker(COSTLY) is None:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in functions.values():
        yield from _cover(cases)


def _cover(cases: list[Any]) -> Iterator[Any]:
    """As few as it takes for all features to occur: each time the one that adds most of them."""
    features = {id(case): features_of(case) for case in cases}
    missing = set().union(*features.values())
    yield cases[0]
    missing -= features[id(cases[0])]
    while missing:
        best = max(cases, key=lambda case: len(features[id(case)] & missing))
        yield best
        missing -= features[id(best)]


def features_of(item: Any) -> frozenset[Feature]:
    """The values of a test's parameters, and the pairs of a compiled backend with each."""
    call = getattr(item, "callspec", None)
    if call is None:
        return frozenset()
    values = {feature for name, value in call.params.items() for feature in _values(name, value)}
    backends = [v for v in call.params.values() if isinstance(v, str) and v in COMPILED]
    return frozenset(values | {(backend, value) for backend in backends for value in values})


def _values(name: str, value: Any) -> Iterator[Feature]:
    """Of a dataclass its fields, of anything else itself; what has no value stands for itself."""
    if is_dataclass(value):
        for field in fields(value):
            yield (name, field.name, str(getattr(value, field.name)))
    else:
        yield (name, type(value).__name__, value if isinstance(value, Hashable) else id(value))
