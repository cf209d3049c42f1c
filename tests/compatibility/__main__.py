"""``python -m tests.compatibility``: all environments, or those that are asked for.

The environment that it runs in builds the wheel, and so needs torch, setuptools, ninja and
pybind11. An environment is removed as soon as it has been tested; with builds of torch for CUDA
one takes some 7 GB, and ``--jobs 2`` twice that.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.checked.results import record
from tests.compatibility import artifacts, interpreters, plans
from tests.compatibility.artifacts import ROOT, ArtifactError, Artifacts
from tests.compatibility.environments import Result, check_all

WORK = ROOT / "build" / "compatibility"
TITLES = ("environment", "torch", "python", "passed", "failed", "skipped", "seconds", "")
WIDTHS = (24, 14, 8, 7, 7, 8, 8, 0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; nothing asked for means everything."""
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility", description=__doc__)
    parser.add_argument("--torch", nargs="*", metavar="VERSION", help="versions, or newest")
    parser.add_argument("--python", nargs="*", metavar="VERSION", help="such as 3.12, or 3.14t")
    names = [plan.name for plan in plans.PACKAGES]
    parser.add_argument("--packages", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a case of each kind of some of the kernels' tests, and a wheel of this tree",
    )
    parser.add_argument(
        "--record",
        metavar="NAME",
        help="that the results for tests/checked begin with; of a quick run none are kept without",
    )
    parser.add_argument(
        "--manylinux",
        type=Path,
        metavar="FOLDER",
        help="leave a wheel for other machines there, and test that (asks for auditwheel)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="environments at a time")
    parser.add_argument("--keep", action="store_true", help="the environments, for a look inside")
    parser.add_argument("--reuse", action="store_true", help="the wheel of the run before")
    options = parser.parse_args(arguments)
    unknown = set(options.packages or ()) - set(names)
    if unknown:
        parser.error(f"--packages should be some of {names}, got {sorted(unknown)}")
    if not options.quick:
        options.record = options.record or "compatibility"
    return options


def chosen(options: argparse.Namespace) -> list[plans.Plan]:
    """The plans that the options ask for."""
    all_of_it = options.torch is None and options.python is None and options.packages is None
    tests = plans.QUICK if options.quick else plans.KERNEL_TESTS
    if all_of_it:
        return plans.everything(tests)
    wanted = options.packages
    if wanted == []:
        wanted = [plan.name for plan in plans.PACKAGES]
    return [
        *(plans.for_torch(version, tests) for version in options.torch or ()),
        *(plan for plan in plans.PACKAGES if plan.name in (wanted or ())),
        *(plans.for_python(version, tests) for version in options.python or ()),
    ]


def line(cells: tuple[str, ...]) -> str:
    """A line of the table."""
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def summary(results: list[Result]) -> str:
    """The last line."""
    passed = sum(not result.problems for result in results)
    tests = sum(result.counts.passed for result in results)
    return f"{len(results)} environments: {passed} passed, {tests} tests"


def brief(result: Result) -> str:
    """An environment in a few words."""
    verdict = "; ".join(result.problems) or f"{result.counts.passed:,} passed"
    return f"{result.name} (torch {result.torch}, Python {result.python}): {verdict}"


def write(results: list[Result], built: Artifacts, missing: list[str], quick: bool) -> None:
    """The report, for whoever wants more than the table."""
    found = {
        "wheel": built.wheel.name,
        "sdist": built.sdist.name,
        "libraries": built.libraries,
        "not_found": missing,
        "left_out": plans.LEFT_OUT,
        "quick": quick,
        "environments": [asdict(result) for result in results],
    }
    (WORK / "report.json").write_text(json.dumps(found, indent=2) + "\n")


def main() -> int:
    """0 if everything passed."""
    options = parse()
    wanted = chosen(options)
    missing = sorted({plan.python for plan in wanted if not interpreters.find(plan.python)})
    for version in missing:
        print(f"no Python {version} was found: its environment is left out")
    wanted = [plan for plan in wanted if plan.python not in missing]
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / "build.log"
    try:
        if options.reuse:
            built = artifacts.reuse(WORK)
        else:
            log.write_text("")
            built = artifacts.build(WORK, log, in_place=options.quick, manylinux=options.manylinux)
    except ArtifactError as error:
        print(error)
        return 1
    print(f"{built.wheel.name}: {built.wheel.stat().st_size / 2**20:.1f} MiB")
    for name, digest in built.libraries.items():
        print(f"{built.wheel.name}: {name} {digest}")
    if options.quick:
        print(f"instead of all tests of the kernels: {' '.join(plans.QUICK)}")
    for path, reason in plans.LEFT_OUT.items():
        print(f"left out: {path} ({reason})")
    print(line(TITLES), flush=True)
    results: list[Result] = []
    for result in check_all(wanted, built, WORK, options.keep, options.jobs):
        results.append(result)
        print(line(result.row()), flush=True)
        if options.record:
            record(f"{options.record}-{result.name}", brief(result), ok=not result.problems)
        write(results, built, missing, options.quick)
    print(summary(results))
    return 0 if results and not any(result.problems for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
