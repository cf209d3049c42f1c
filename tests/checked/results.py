"""Results of runs: with what they were made, where they lie, and what is kept of them."""

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Collection
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.machine import cpu_name

ROOT = Path(__file__).parents[2]
FRESH = ROOT / "build/checked"
KEPT = ROOT / "tests/checked.json"
PACKAGES = ("torch", "triton", "numpy", "hypothesis")
STAMPED = ("commit", "date", "python", "processor", *PACKAGES)

Result = dict[str, Any]


def stamp() -> dict[str, str]:
    """Under what a result was found: commit, date, versions, processor."""
    found = {
        "commit": _git("rev-parse", "--short=8", "HEAD") or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "processor": f"{cpu_name()}, {os.cpu_count()} cores",
    }
    if _git("status", "--porcelain", "--untracked-files=no"):
        found["commit"] += " with changes"
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # a source distribution, on a machine without git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def record(name: str, summary: str, *, ok: bool = True) -> None:
    """Leave the result of a program that is not pytest: the line that it ends with, and whether
    all is as it should be."""
    FRESH.mkdir(parents=True, exist_ok=True)
    result = {"stamp": stamp(), "summary": summary, "ok": ok}
    (FRESH / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def collect(names: Collection[str]) -> dict[str, Result]:
    """These results: those kept from earlier, replaced by those that lie under build. What else was
    kept is forgotten."""
    found: dict[str, Result] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for path in sorted(FRESH.glob("*.json")):
        found[path.stem] = json.loads(path.read_text())
    for path in sorted(FRESH.glob("*.xml")):
        found[path.stem] = read_junit(path)
    found = {name: result for name, result in found.items() if name in names}
    KEPT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return found


def read_junit(path: Path) -> Result:
    """Counts of a pytest report, for each file of tests, and the stamp that conftest.py left."""
    suite = ElementTree.parse(path).getroot()
    if suite.tag == "testsuites":
        suite = suite[0]
    properties = suite.find("properties")
    found = {p.attrib["name"]: p.attrib["value"] for p in properties or ()}
    stamped = {name: found[name] for name in STAMPED if name in found}  # hypothesis adds others
    files: dict[str, Counter[str]] = {}
    for case in suite.iter("testcase"):
        files.setdefault(_file(case.attrib["classname"]), Counter())[_outcome(case)] += 1
    counts = {name: dict(counter) for name, counter in sorted(files.items())}
    return {
        "stamp": stamped,
        "files": counts,
        "minutes": round(float(suite.attrib["time"]) / 60, 1),
    }


def _file(classname: str) -> str:
    """The file of a test, for instance of ``tests.pytorch.test_opinfo.TestCommonCPU``."""
    parts = classname.split(".")
    last = max((i for i, part in enumerate(parts) if part.startswith("test_")), default=0)
    return "/".join(parts[: last + 1]) + ".py"


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"
