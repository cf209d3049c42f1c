"""tests/README.md, made of the list of checks and of results."""

from collections import Counter
from collections.abc import Mapping

from tests.checked.checks import SECTIONS, Check
from tests.checked.results import ROOT, Result

PAGE = ROOT / "tests/README.md"

_HEAD = """\
# What is checked

This page is written by `make checked`, from the reports of the runs that it names; nobody types the
figures. Commands that begin with `pytest` are parts of `make test-all`, and their counts are those
of its two parts together: `make test` runs a case of each kind, in minutes, and `make test-rest`
what that leaves out. All that is marked CI runs there before a change lands; the rest takes longer,
and is run by hand.
"""


def render(results: dict[str, Result]) -> str:
    """The whole page."""
    parts = [_HEAD]
    for section in SECTIONS:
        rows = ["| what | command | CI | last result |", "|---|---|---|---|"]
        rows += [_row(check, results) for check in section.checks]
        parts.append("\n\n".join(filter(None, (f"## {section.title}", section.about))))
        parts.append("\n".join(rows))
    parts += ["## Under what", _stamps(results)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _row(check: Check, results: dict[str, Result]) -> str:
    found = [results[name] for name in check.sources if name in results]
    shown = [_counts(check, found)] if check.files and found else [_shown(r) for r in found]
    last = "<br>".join(shown) or "not run yet"
    return f"| {check.what} | `{check.command}` | {'yes' if check.in_ci else ''} | {last} |"


def _shown(result: Result) -> str:
    if "summary" in result:
        text: str = result["summary"]
        return text
    return _text(*result["files"].values())


def _counts(check: Check, results: list[Result]) -> str:
    """Of the files of a row, in all of these reports."""
    return _text(
        *(
            counts
            for result in results
            for name, counts in result["files"].items()
            if any(name == file or name.startswith(f"{file}/") for file in check.files)
        )
    )


def _text(*counts: Mapping[str, int]) -> str:
    total: Counter[str] = Counter()
    for found in counts:
        total.update(found)
    parts = [f"{total[kind]:,} {kind}" for kind in ("failed", "passed", "skipped") if total[kind]]
    return ", ".join(parts) or "no test ran"


def _stamps(results: dict[str, Result]) -> str:
    groups: dict[str, list[str]] = {}
    for name, result in sorted(results.items()):
        found = dict(result["stamp"])
        date, commit = found.pop("date", ""), found.pop("commit", "")
        processor = found.pop("processor", "")
        versions = ", ".join(f"{package} {number}" for package, number in sorted(found.items()))
        took = f" ({result['minutes']} min)" if "minutes" in result else ""
        under = f"| {date} | {commit} | {versions}; {processor} |"
        groups.setdefault(under, []).append(f"{name}{took}")
    rows = [f"{under} {', '.join(names)} |" for under, names in sorted(groups.items())]
    return "\n".join(["| date | commit | with | results |", "|---|---|---|---|", *rows])
