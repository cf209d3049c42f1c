"""`python -m tests.mutation [--only REGEX] [--jobs N] [--list]`; ends with 1 if a fault survives.

Copies of the tree are kept in build/mutation. tests/mutation/report.json, which is kept with the
sources, tells what became of each fault, in this run or in an earlier one with other faults.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path
from queue import LifoQueue

from tests.checked.results import record
from tests.mutation.builds import BUILDS, DoesNotBuildError
from tests.mutation.fault import AREAS, Area, Fault
from tests.mutation.faults import FAULTS
from tests.mutation.tree import KILLED, NOT_BUILT, SURVIVED, TIMED_OUT, Result, Tree, copy_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutation"
REPORT = Path(__file__).with_name("report.json")


class Pool:
    """Copies of the tree, one for each fault that is tried at a time."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.executor = ThreadPoolExecutor(len(trees))
        self.all = trees
        self._free: LifoQueue[Tree] = LifoQueue()
        for tree in trees:
            self._free.put(tree)

    def prepare(self, names: Sequence[str]) -> None:
        """Build libraries in each copy."""

        def build(tree: Tree) -> None:
            for name in names:
                tree.prepare(name)

        list(self.executor.map(build, self.all))

    def run_tests(self, area: Area, limit: float) -> Result:
        """Run the tests of an area without a fault, in any copy."""
        tree = self._free.get()
        try:
            return tree.run_tests(area, limit)
        finally:
            self._free.put(tree)

    def try_fault(self, fault: Fault, area: Area, limit: float) -> Result:
        """Try a fault in any copy."""
        tree = self._free.get()
        try:
            return tree.try_fault(fault, area, limit)
        finally:
            self._free.put(tree)


def check_areas(pool: Pool, areas: dict[str, Area]) -> dict[str, float]:
    """A time limit for each area, whose tests have to pass without a fault: or nothing is proved.

    Raises:
        SystemExit: the tests of an area fail.
    """
    tries = {pool.executor.submit(pool.run_tests, area, 1800): n for n, area in areas.items()}
    limits = {}
    for done in as_completed(tries):
        name, result = tries[done], done.result()
        print(f"without a fault: {name}: {result.by} ({result.seconds:.0f} s)", flush=True)
        if result.outcome != SURVIVED:
            pool.executor.shutdown(cancel_futures=True)
            raise SystemExit(f"the tests of {name} fail without a fault: mend them first")
        limits[name] = 60 + 4 * result.seconds
    return limits


def is_as_declared(fault: Fault, result: Result) -> bool:
    """Whether the tests notice it or, if it is equivalent, do not."""
    return result.outcome in ((SURVIVED,) if fault.equivalent else (KILLED, TIMED_OUT))


def summary(results: dict[Fault, Result]) -> str:
    """One line on all faults."""
    counts = Counter(
        "equivalent" if fault.equivalent and result.outcome == SURVIVED else result.outcome
        for fault, result in results.items()
    )
    killed = f"{counts[KILLED] + counts[TIMED_OUT]} killed"
    if counts[TIMED_OUT]:
        killed += f" ({counts[TIMED_OUT]} by the time limit)"
    parts = [killed, *(f"{counts[kind]} {kind}" for kind in ("equivalent", SURVIVED))]
    if counts[NOT_BUILT]:
        parts.append(f"{counts[NOT_BUILT]} {'do not build'}")
    return f"{len(results)} faults: " + ", ".join(parts)


def read_report(path: Path) -> dict[Fault, Result]:
    """What became of those faults that are the same today."""
    rows = json.loads(path.read_text())["faults"] if path.exists() else []
    found = {row["key"]: Result(row["result"], row["by"], row["seconds"]) for row in rows}
    return {fault: found[_key(fault)] for fault in FAULTS if _key(fault) in found}


def _key(fault: Fault) -> str:
    return sha256(repr(fault).encode()).hexdigest()[:16]


def write_report(results: dict[Fault, Result], path: Path) -> None:
    """What became of each fault, for programs."""
    rows = [
        {
            "key": _key(fault),
            **{name: getattr(fault, name) for name in ("name", "area", "path", "equivalent")},
            "result": result.outcome,
            "by": result.by.partition(" - ")[0],
            "seconds": round(result.seconds, 1),
            "as_declared": is_as_declared(fault, result),
        }
        for fault, result in results.items()
    ]
    report = {"summary": summary(results), "faults": rows}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def run(faults: Sequence[Fault], areas: dict[str, Area], pool: Pool) -> dict[Fault, Result]:
    """Try all faults, in the order of their areas; prints a line for each."""
    areas = {name: area for name, area in areas.items() if any(f.area == name for f in faults)}
    limits = check_areas(pool, areas)
    order = sorted(faults, key=lambda fault: list(areas).index(fault.area))
    tries = {
        pool.executor.submit(pool.try_fault, fault, areas[fault.area], limits[fault.area]): fault
        for fault in order
    }
    results: dict[Fault, Result] = {}
    for done in as_completed(tries):
        fault, result = tries[done], done.result()
        results[fault] = result
        keep(results)
        mark = " " if is_as_declared(fault, result) else "!"
        print(
            f"{mark} {fault.area}: {fault.name}: {result.outcome} ({result.seconds:.0f} s): "
            f"{result.by[:200]}",
            flush=True,
        )
    return {fault: results[fault] for fault in order}


def keep(results: dict[Fault, Result]) -> None:
    """Add results to the report, so that a run that is broken off leaves them too."""
    known = read_report(REPORT) | results
    tried = {fault: known[fault] for fault in FAULTS if fault in known}
    write_report(tried, REPORT)
    fine = all(is_as_declared(*pair) for pair in tried.items())
    record("mutation", f"{summary(tried)}, of {len(FAULTS)}", ok=fine)


def _builds(faults: Sequence[Fault], name: str) -> bool:
    """Whether a library is needed. That for the CPU always is: most tests run on it."""
    return name == "cpu" or any(AREAS[fault.area].builds == name for fault in faults)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.mutation", description="Do the tests notice?")
    parser.add_argument("--only", default="", help="faults whose area, name or file matches")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at a time")
    parser.add_argument("--list", action="store_true", help="name the faults and leave")
    options = parser.parse_args(arguments)
    wanted = re.compile(options.only, re.IGNORECASE)
    chosen = [f for f in FAULTS if wanted.search(f"{f.area}: {f.name} ({f.path})")]
    if options.list:
        print("\n".join(f"{f.area}: {f.name} ({f.path})" for f in chosen))
        return 0
    if not chosen:
        raise SystemExit(f"no fault matches {options.only!r}")
    start = time.monotonic()
    pool = Pool([copy_of(ROOT, FOLDER / str(job)) for job in range(options.jobs)])
    try:
        pool.prepare([name for name in BUILDS if _builds(chosen, name)])
    except DoesNotBuildError as problem:
        raise SystemExit(f"the sources do not build without a fault:\n{problem}") from None
    results = run(chosen, AREAS, pool)
    print(f"{summary(results)} ({(time.monotonic() - start) / 60:.0f} minutes)")
    untried = len(FAULTS) - len(read_report(REPORT))
    if untried:
        print(f"not tried yet: {untried} of {len(FAULTS)} faults")
    return 0 if all(is_as_declared(*pair) for pair in results.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
