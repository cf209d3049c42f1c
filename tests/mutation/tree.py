"""A copy of the tree: faults are planted there, libraries built and tests run."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutation import builds
from tests.mutation.fault import Area, Fault
from tests.mutation.forks import Forks

KILLED, TIMED_OUT, SURVIVED, NOT_BUILT = "killed", "timed out", "survived", "does not build"
"""What becomes of a fault. One that does not build, or cannot be imported, proves nothing."""

PYTEST = ("-x", "-q", "--tb=line", "-rfE", "--assert=plain", "-p", "no:cacheprovider")
"""Nothing is rewritten to explain itself: it would be again in each run, as nothing is kept."""


@dataclass(frozen=True)
class Result:
    """What became of a fault, and the test or the reason that decided it."""

    outcome: str
    by: str
    seconds: float = 0.0


class Tree:
    """Sources in ``folder`` that may be changed; ``forks`` run the tests."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder = folder
        self._forks = forks
        self._right: dict[str, tuple[Path, Path]] = {}  # of each build: the library, and a copy

    def prepare(self, build: str) -> None:
        """Build a library without any fault."""
        library = builds.BUILDS[build](self.folder)
        kept = self.folder / f"right_{build}.so"
        shutil.copy2(library, kept)
        self._right[build] = library, kept

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The tree with a fault in it, for a while."""
        path = self.folder / fault.path
        before = path.read_text()
        count = before.count(fault.right)
        if count != 1:
            raise ValueError(f"{fault.path} has {count} times what {fault.name!r} replaces")
        path.write_text(before.replace(fault.right, fault.wrong))
        try:
            yield
        finally:
            path.write_text(before)
            for library, kept in self._right.values():
                shutil.copy2(kept, library)

    def try_fault(self, fault: Fault, area: Area, limit: float) -> Result:
        """Plant a fault, build what it changes, and run the tests of its area."""
        start = time.monotonic()
        with self.planted(fault):
            result = self._build(area) or self.run_tests(area, limit)
        return Result(result.outcome, result.by, time.monotonic() - start)

    def _build(self, area: Area) -> Result | None:
        if not area.builds:
            return None
        library, kept = self._right[area.builds]
        try:
            builds.BUILDS[area.builds](self.folder)
        except builds.DoesNotBuildError as problem:
            return Result(NOT_BUILT, _first(r"error: .*", str(problem)))
        if library.read_bytes() == kept.read_bytes():
            return Result(SURVIVED, "the compiler makes the same code of it")
        return None

    def run_tests(self, area: Area, limit: float) -> Result:
        """Run the tests of an area up to the first that fails."""
        arguments = [*PYTEST, *area.tests]
        start = time.monotonic()
        code, said = self._forks(arguments, self.folder, self._environment(area), limit)
        outcome, by = _verdict(code, said, limit)
        return Result(outcome, by, time.monotonic() - start)

    def _environment(self, area: Area) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if "METAPOOL" not in name and not name.startswith("PYTEST_")
        }
        kept |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.folder)}
        # CI has hypothesis draw the same cases every time.
        kept |= {"CI": "1", "METAPOOL_REQUIRE_NATIVE": "1", **area.environment}
        if area.builds == "cuda":
            kept["METAPOOL_CUDA_HOST"] = str(self._right["cuda"][0])
        if area.builds == "arm":
            kept["METAPOOL_ARM"] = str(self._right["arm"][0].parent)
        return kept


def copy_of(root: Path, folder: Path) -> Tree:
    """A tree of the files of ``root`` that git knows or would take.

    Those that are the same already are left alone: what was built of them is still right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    names = {name for name in listed.split("\0") if name and (root / name).is_file()}
    for name in names:
        there = folder / name
        if there.exists() and there.read_bytes() == (root / name).read_bytes():
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, there)
    for path in list(folder.rglob("*.py")):
        if path.relative_to(folder).as_posix() not in names:
            path.unlink()
    builds.keep_two_types(folder)
    return Tree(folder, Forks())


def _verdict(code: int | None, said: str, limit: float) -> tuple[str, str]:
    if code is None:
        return TIMED_OUT, f"the limit of {limit:.0f} s"
    if code == 0:
        return SURVIVED, _first(r"\d+ passed.*", said)
    if code == 1:
        return KILLED, _first(r"(?<=^FAILED ).*|(?<=^ERROR ).*", said)
    if code < 0:
        running = _first(r"(?<=, line )\d+ in test_\w+", said)
        return KILLED, f"{signal.Signals(-code).name} in {running.split(' ')[-1]}"
    # Tests could not be collected, as where a module does not import.
    return NOT_BUILT, _first(r"(?<=^E  ) *\w*(Error|Exception|Exit)\b.*", said) or said[-300:]


def _first(pattern: str, text: str) -> str:
    match: Callable[..., re.Match[str] | None] = re.compile(pattern, re.MULTILINE).search
    found = match(text)
    return found[0].strip() if found else ""
