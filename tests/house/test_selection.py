"""What `make test` runs: every value of every parameter; with `make test-rest`, all tests once."""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, is_dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import cases, selection
from tests.cases import Case

ROOT = Path(__file__).parents[2]


@dataclass(eq=False)
class Drawn:
    """A test with parameters, as pytest collects it."""

    name: str
    params: dict[str, Any] | None = None
    markers: tuple[str, ...] = ()
    callspec: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.params is not None:
            self.callspec = SimpleNamespace(params=self.params)

    @property
    def nodeid(self) -> str:
        return self.name if self.params is None else f"{self.name}[{self.params}]"

    def get_closest_marker(self, name: str) -> object:
        return name if name in self.markers else None


def _quick(items: list[Any]) -> list[Any]:
    """The quick part, after a look at whether both are all there is."""
    parts = [selection.part(items, name) for name in selection.PARTS]
    assert Counter(map(id, items)) == Counter(id(item) for part in parts for item in part)
    return parts[0]


def test_every_value_occurs_with_every_compiled_backend() -> None:
    axes = {
        "backend": ("reference", *selection.COMPILED),
        "dtype": cases.DTYPES,
        "function": (len, sum),
        "case": [Case(), Case(layout="sliced"), Case(stride=2), Case(layout="sliced", stride=2)],
    }
    items = [Drawn("t", dict(zip(axes, row, strict=True))) for row in product(*axes.values())]
    quick = [item.callspec.params for item in _quick(items)]
    for backend in selection.COMPILED:
        chosen = [row for row in quick if row["backend"] == backend]
        assert {row["dtype"] for row in chosen} == set(cases.DTYPES)
        assert {row["function"] for row in chosen} == {len, sum}
        assert {row["case"].layout for row in chosen} == {"contiguous", "sliced"}
        assert {row["case"].stride for row in chosen} == {1, 2}
        assert len(chosen) == len(cases.DTYPES), "no more than it takes"
    assert sum(row["backend"] == "reference" for row in quick) == 1


def test_functions_do_not_stand_for_each_other() -> None:
    items = [Drawn(name, {"n": n}) for name in ("a", "b") for n in (1, 2)] + [Drawn("c")]
    assert _quick(items) == items


def test_equal_numbers_of_other_types_are_other_values() -> None:
    items = [Drawn("t", {"n": n}) for n in (1, True, 1.0)]
    assert _quick(items) == items


def test_what_is_costly_is_left_out() -> None:
    items = [Drawn("a"), Drawn("a_whole_run", None, (selection.COSTLY,))]
    items += [Drawn("b", {"n": n}, (selection.COSTLY,) if n == 2 else ()) for n in (1, 2, 3)]
    assert [item.nodeid for item in _quick(items)] == ["a", "b[{'n': 1}]", "b[{'n': 3}]"]


def test_no_value_of_the_tests_of_this_session_is_missing(request: pytest.FixtureRequest) -> None:
    """Of any that some test has which is not costly; whichever part is being run."""
    items = request.config.stash[selection.COLLECTED]
    wanted, found = (_features(some) for some in (items, _quick(items)))
    assert request.node in items
    missing = {name: values - found.get(name, set()) for name, values in wanted.items()}
    assert {name: values for name, values in missing.items() if values} == {}


@pytest.mark.costly
def test_the_parts_are_all_tests_and_none_is_in_both() -> None:
    """As ``--part`` takes them: of a file with parameters, and of this one with a costly test."""
    files = ["tests/op/test_sweep.py", "tests/house/test_selection.py"]
    quick, rest, everything = (
        _collected(*options, *files) for options in (["--part=quick"], ["--part=rest"], [])
    )
    assert quick + rest == everything
    assert quick and rest and len(everything) == everything.total()


def _collected(*arguments: str) -> "Counter[str]":
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Counter(line for line in done.stdout.splitlines() if "::" in line)


def _features(items: list[Any]) -> dict[str, set[tuple[str, str]]]:
    """Of each function its parameters, and the fields of its cases: written here once more."""
    found: dict[str, set[tuple[str, str]]] = {}
    for item in items:
        if item.get_closest_marker(selection.COSTLY) is None:
            call = getattr(item, "callspec", None)
            seen = found.setdefault(item.nodeid.partition("[")[0], set())
            for name, value in (call.params if call else {}).items():
                parts = vars(value) if is_dataclass(value) else {"": value}
                seen |= {(f"{name}.{part}", repr(x)) for part, x in parts.items()}
    return found
