"""`make mutate` can be believed: its faults fit the sources, and it tells outcomes apart."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutation import __main__ as program
from tests.mutation import builds
from tests.mutation.fault import AREAS, Area, Fault
from tests.mutation.faults import FAULTS
from tests.mutation.forks import Forks
from tests.mutation.tree import KILLED, NOT_BUILT, SURVIVED, TIMED_OUT, Result, Tree

ROOT = Path(__file__).parents[2]

SOURCE = """\
def add_up(n):
    total = 0
    while n > 0:
        total += n
        n -= 1
    return total
"""
TEST = """\
from sums import add_up

def test_add_up():
    assert add_up(3) == 6
"""
SUMS = Area(("test_sums.py",))


def _fault(right: str, wrong: str, equivalent: str = "") -> Fault:
    return Fault("a fault", "sums", "sums.py", right, wrong, equivalent)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def tree(tmp_path: Path, forks: Forks) -> Tree:
    (tmp_path / "sums.py").write_text(SOURCE)
    (tmp_path / "test_sums.py").write_text(TEST)
    return Tree(tmp_path, forks)


def test_every_fault_fits_the_sources() -> None:
    """Also where one stands inside a longer text: the one that is meant has to be the only one."""
    texts = {path: (ROOT / path).read_text() for path in {fault.path for fault in FAULTS}}
    counts = {f"{f.area}: {f.name}": texts[f.path].count(f.right) for f in FAULTS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert [fault.name for fault in FAULTS if fault.right == fault.wrong] == []


def test_every_fault_has_been_tried_and_is_noticed() -> None:
    """A fault that is new or another than it was has to be tried: ``make mutate ONLY=its name``."""
    results = program.read_report(program.REPORT)
    assert [fault.name for fault in FAULTS if fault not in results] == []
    wrong = [f.name for f, result in results.items() if not program.is_as_declared(f, result)]
    assert wrong == []


def test_there_are_enough_faults_everywhere() -> None:
    assert len(FAULTS) >= 40
    assert {fault.area for fault in FAULTS} == set(AREAS)
    names = Counter((fault.area, fault.name) for fault in FAULTS)
    assert [name for name, count in names.items() if count > 1] == []


def test_the_tests_of_every_area_are_there() -> None:
    arguments = {argument for area in AREAS.values() for argument in area.tests}
    files = {argument.split("::")[0] for argument in arguments if ".py" in argument}
    assert [name for name in files if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("right", "wrong", "outcome", "by"),
    [
        ("total += n", "total -= n", KILLED, "test_sums.py::test_add_up"),
        ("return total", "import os; os.abort()", KILLED, "SIGABRT in test_add_up"),
        ("while n > 0:", "while n >= 1:", SURVIVED, "1 passed"),
        ("return total", "return (total", NOT_BUILT, "SyntaxError"),
        ("n -= 1", "n -= 0", TIMED_OUT, "the limit of 6 s"),
    ],
)
def test_outcomes_are_told_apart(tree: Tree, right: str, wrong: str, outcome: str, by: str) -> None:
    limit = 6 if outcome == TIMED_OUT else 120
    result = tree.try_fault(_fault(right, wrong), SUMS, limit)
    assert result.outcome == outcome, result
    assert by in result.by
    assert (tree.folder / "sums.py").read_text() == SOURCE


def test_an_area_without_a_test_proves_nothing(tree: Tree) -> None:
    result = tree.run_tests(Area(("test_sums.py", "-k", "nothing")), 120)
    assert result.outcome == NOT_BUILT


def test_a_fault_that_stands_nowhere_is_an_error(tree: Tree) -> None:
    with pytest.raises(ValueError, match="has 0 times"):
        tree.try_fault(_fault("product", "sum"), SUMS, 120)


def test_a_library_is_built_with_the_fault_and_put_back(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that takes ``!`` for an error and leaves comments out."""
    library = tree.folder / "library.so"

    def build(root: Path) -> Path:
        text = (root / "sums.py").read_text()
        if "!" in text:
            raise builds.DoesNotBuildError("sums.py:1: error: unexpected !")
        library.write_text("\n".join(line for line in text.split("\n") if "#" not in line))
        return library

    monkeypatch.setitem(builds.BUILDS, "cpu", build)
    tree.prepare("cpu")
    area = dataclasses.replace(SUMS, builds="cpu")
    bad = tree.try_fault(_fault("n -= 1", "n -= !"), area, 120)
    assert (bad.outcome, bad.by) == (NOT_BUILT, "error: unexpected !")
    same = tree.try_fault(_fault("def add_up", "# another comment\ndef add_up"), area, 120)
    assert (same.outcome, same.by) == (SURVIVED, "the compiler makes the same code of it")
    assert tree.try_fault(_fault("n -= 1", "n -= 2"), area, 120).outcome == KILLED
    assert library.read_text() == SOURCE


@pytest.mark.parametrize(
    ("equivalent", "outcome", "fine"),
    [
        ("", KILLED, True),
        ("", TIMED_OUT, True),
        ("", SURVIVED, False),
        ("", NOT_BUILT, False),
        ("shown", SURVIVED, True),
        ("shown", KILLED, False),
        ("shown", NOT_BUILT, False),
    ],
)
def test_what_is_as_declared(equivalent: str, outcome: str, fine: bool) -> None:
    assert program.is_as_declared(_fault("a", "b", equivalent), Result(outcome, "")) is fine


def test_a_run_ends_with_a_line_a_report_and_a_status(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = (
        _fault("total += n", "total -= n"),
        dataclasses.replace(_fault("n > 0", "n >= 1", "n is whole"), name="another"),
    )
    monkeypatch.setattr(program, "FAULTS", faults)
    monkeypatch.setattr(program, "AREAS", {"sums": SUMS})
    monkeypatch.setattr(program, "FOLDER", tmp_path)
    monkeypatch.setattr(program, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(program, "copy_of", lambda root, folder: tree)
    monkeypatch.setattr(program, "BUILDS", {})
    recorded: dict[str, str] = {}
    monkeypatch.setattr(program, "record", lambda name, line, ok: recorded.update({name: line}))
    assert program.main(["--jobs", "1"]) == 0
    assert "2 faults: 1 killed, 1 equivalent, 0 survived (" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["result"] for row in report["faults"]] == [KILLED, SURVIVED]
    assert report["faults"][0]["by"].startswith("test_sums.py::test_add_up")

    undeclared = dataclasses.replace(faults[1], equivalent="")
    monkeypatch.setattr(program, "FAULTS", (faults[0], undeclared))
    assert program.main(["--jobs", "1", "--only", "another"]) == 1
    assert "1 faults: 0 killed, 0 equivalent, 1 survived (" in capsys.readouterr().out
    # The first is as it was tried before; what is known of the second was about another fault.
    assert recorded["mutation"] == "2 faults: 1 killed, 0 equivalent, 1 survived, of 2"


def test_tests_that_fail_without_a_fault_end_it(tree: Tree) -> None:
    (tree.folder / "test_sums.py").write_text(TEST.replace("6", "7"))
    with pytest.raises(SystemExit, match="fail without a fault"):
        program.run([_fault("total += n", "total -= n")], {"sums": SUMS}, program.Pool([tree]))
