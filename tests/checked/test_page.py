"""The page on what is checked: made by a script, complete, true to its results."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checked import page, results
from tests.checked.checks import SECTIONS, Check

ROOT = Path(__file__).parents[2]
CHECKS = [check for section in SECTIONS for check in section.checks]
KEPT: dict[str, Any] = json.loads(results.KEPT.read_text())

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" time="90.0">
<properties><property name="commit" value="abc"/><property name="torch" value="2.13"/>
<property name="hypothesis-statistics-x" value="dGVz"/></properties>
<testcase classname="tests.test_a" name="x"/><testcase classname="tests.test_a.TestCPU" name="y"/>
<testcase classname="tests.test_a" name="z"><failure message="no"/></testcase>
<testcase classname="tests.search.test_b" name="x"><skipped message="why"/></testcase>
</testsuite></testsuites>"""


def test_the_page_is_what_the_script_makes_of_the_results() -> None:
    assert page.PAGE.read_text() == page.render(KEPT), "run `make checked`"


def test_nothing_on_the_page_has_failed() -> None:
    for name, result in KEPT.items():
        files = result.get("files", {})
        assert not [file for file, counts in files.items() if counts.get("failed")], name
        assert result.get("ok", True), name


def test_all_that_ci_runs_has_a_result() -> None:
    """Of the instruction sets those that the machine has, but for the widest."""
    missing = [c.command for c in CHECKS if c.in_ci and not KEPT.keys() & set(c.sources)]
    assert missing == []


def test_every_file_of_tests_is_on_the_page() -> None:
    named = [file for check in CHECKS for file in check.files]
    assert len(set(named)) == len(named)
    # Which have targets of their own.
    named += [
        "tests/op/test_large.py",
        "tests/triton/test_interpreter.py",
        "tests/devices/test_targets.py",
    ]
    named += ["tests/arm/test_same_bits.py"]
    for path in (ROOT / "tests").rglob("test_*.py"):
        file = path.relative_to(ROOT).as_posix()
        assert file in named or path.parent.relative_to(ROOT).as_posix() in named, file
    assert all((ROOT / file).exists() for file in named)


@pytest.mark.parametrize("check", [c for c in CHECKS if c.target], ids=lambda c: c.target)
def test_every_command_is_there_and_leaves_its_result(check: Check) -> None:
    rules = (ROOT / "Makefile").read_text().splitlines()
    assert [line for line in rules if line.startswith(f"{check.target}:")]
    ci = ROOT / ".ci/run"  # which a source distribution does not have
    assert not ci.exists() or (check.target in ci.read_text().split()) == check.in_ci


def test_counts_of_a_report(tmp_path: Path) -> None:
    file = tmp_path / "test.xml"
    file.write_text(JUNIT)
    found = results.read_junit(file)
    assert found["files"] == {
        "tests/test_a.py": {"passed": 2, "failed": 1},
        "tests/search/test_b.py": {"skipped": 1},
    }
    assert found["minutes"] == 1.5 and found["stamp"] == {"commit": "abc", "torch": "2.13"}
    parts = {"test": found, "test-rest-op": found, "isas": found}
    row = page._row(Check("all", ("tests/test_a.py",)), parts)
    assert row.endswith("| 2 failed, 4 passed |"), "both parts together"
    assert page._row(Check("search", ("tests/search",)), parts).endswith("| 1 skipped |")
    assert page._row(Check("none", ("tests/test_c.py",)), parts).endswith("no test ran |")
    row = page._row(Check("other", target="isas", results=("isas",)), parts)
    assert row.endswith("| 1 failed, 2 passed, 1 skipped |")


def test_results_made_under_the_same_share_a_line() -> None:
    old, new = {"date": "2026-01-01", "torch": "2.10"}, {"date": "2026-02-02", "torch": "2.11"}
    found = {
        "b": {"stamp": old, "minutes": 1.5},
        "a": {"stamp": old},
        "c": {"stamp": new},
    }
    lines = page._stamps(found).splitlines()[2:]
    assert [line.rpartition(" | ")[2] for line in lines] == ["a, b (1.5 min) |", "c |"]
    assert "2026-01-01" in lines[0] and "torch 2.11" in lines[1]


def test_new_results_replace_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FRESH", tmp_path / "build")
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept.json")
    kept = {"fuzz": {"summary": "old"}, "b": {}, "gone": {}}
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    results.record("fuzz", "20,000 calls")
    found = results.collect(["fuzz", "b", "never run"])
    assert found["fuzz"]["summary"] == "20,000 calls" and found.keys() == {"fuzz", "b"}
    assert "torch" in found["fuzz"]["stamp"] and found["fuzz"]["stamp"]["date"].startswith("20")
    assert json.loads((tmp_path / "kept.json").read_text()) == found
