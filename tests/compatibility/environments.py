"""An environment: made, filled, tested and taken away."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.compatibility.artifacts import PACKAGE, Artifacts, lowest
from tests.compatibility.interpreters import find
from tests.compatibility.plans import Plan, Tests

PROBE = Path(__file__).with_name("probe.py")
# What would bring a compiler back, or settings of this process.
UNSET = ("CXX", "CC", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "VIRTUAL_ENV")
BUILD_TOOLS = ("setuptools>=77", "ninja", "pybind11")


class StepError(Exception):
    """A step failed, and the environment with it."""


@dataclass
class Counts:
    """Tests by what became of them."""

    passed: int = 0
    failed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """How often each reason was given."""

    def add(self, file: Path) -> None:
        """Add what pytest wrote into a JUnit file."""
        for case in ElementTree.parse(file).getroot().iter("testcase"):
            kinds = {child.tag: child.get("message", "") for child in case}
            if "skipped" in kinds:
                reason = kinds["skipped"]
                self.skipped[reason] = self.skipped.get(reason, 0) + 1
            elif kinds.keys() & {"failure", "error"}:
                self.failed += 1
            else:
                self.passed += 1


@dataclass
class Result:
    """What an environment was found to be."""

    name: str
    torch: str = "?"
    python: str = "?"
    counts: Counts = field(default_factory=Counts)
    problems: list[str] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)
    info: str = ""
    seconds: float = 0.0

    def row(self) -> tuple[str, ...]:
        """For the table."""
        counts = (self.counts.passed, self.counts.failed, sum(self.counts.skipped.values()))
        verdict = "; ".join(self.problems) or "passed"
        return (
            self.name,
            self.torch,
            self.python,
            *map(str, counts),
            f"{self.seconds:.0f}",
            verdict,
        )


class Environment:
    """A virtual environment for a plan, in a folder of its own."""

    def __init__(self, plan: Plan, artifacts: Artifacts, work: Path) -> None:
        self.plan, self.artifacts = plan, artifacts
        self.folder, self.log = work / plan.name, work / f"{plan.name}.log"
        self.python = self.folder / "bin" / "python"
        self.result = Result(plan.name)

    def check(self, keep: bool) -> Result:
        """Everything, from an empty folder back to one."""
        began = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.write_text("")
        try:
            self._make()
            self._install()
            self._ask()
            for tests in self.plan.tests:
                self._test(tests)
            self._compare_libraries("after the tests")
        except StepError as error:
            self.result.problems.append(str(error))
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.result.seconds = time.monotonic() - began
        return self.result

    def _make(self) -> None:
        interpreter = find(self.plan.python)
        if interpreter is None:
            raise StepError(f"no Python {self.plan.python} was found")
        self._run([interpreter, "-m", "venv", str(self.folder)])

    def _install(self) -> None:
        torch = "torch" if self.plan.torch == "newest" else f"torch=={self.plan.torch}"
        constraints = self.folder / "constraints"  # also for the environment that pip builds in
        held = lowest(self.artifacts.requirements) if self.plan.lowest else []
        constraints.write_text("\n".join([torch, *held]) + "\n")
        isolated = self.plan.install == "sdist, isolated"
        if not isolated:
            self._pip(torch, "numpy", *(BUILD_TOOLS if self.plan.install == "sdist" else ()))
        sdist, wheel = self.artifacts.sdist, self.artifacts.wheel
        ours = wheel if self.plan.install == "wheel" else sdist
        # The cache would hold what another environment has built of the source distribution.
        options = ["--no-cache-dir"] + ([] if isolated else ["--no-build-isolation"])
        variables = {
            "PIP_CONSTRAINT": str(constraints),
            "PIP_BUILD_CONSTRAINT": str(constraints),
            # Python makes no difference to the CUDA kernels, which the wheel has.
            "METAPOOL_BUILD_CUDA": "0",
        }
        extras = ",".join(self.plan.extras)
        self._pip(*options, f"{PACKAGE}[{extras}] @ {ours.as_uri()}", variables=variables)
        if self.plan.after:
            self._pip(*self.plan.after)
        gone = [name for name in ("triton", "numpy") if name in self.plan.without]
        if gone:
            self._run([str(self.python), "-m", "pip", "uninstall", "--yes", *gone])
        if "numpy module" in self.plan.without:
            for module in self._package().glob("_numpy_ops*.so"):
                module.unlink()

    def _ask(self) -> None:
        """What is installed is what was meant to be, and says of itself what is true."""
        said = self._run([str(self.python), "-I", str(PROBE)], self._variables())
        facts: dict[str, Any] = json.loads(said.splitlines()[-1])
        self.result.torch, self.result.python = facts["torch"], facts["python"]
        self.result.info = facts["info"]
        wanted = self.plan.torch
        if wanted != "newest" and facts["torch"].partition("+")[0] != wanted:
            raise StepError(f"torch {facts['torch']} was installed and not {wanted}")
        if Path(facts["package"]) != self._package():
            raise StepError(f"imported from {facts['package']} and not {self._package()}")
        if not facts["is_right"]:
            raise StepError("the result is not that of the reference")
        lacks_numpy = bool({"numpy", "numpy module"} & set(self.plan.without))
        if (facts["numpy_problem"] is not None) != (lacks_numpy or not self.plan.is_native):
            raise StepError(f"numpy_api says: {facts['numpy_problem']}")
        for pattern in self.plan.says:
            if not re.search(pattern, facts["info"]):
                raise StepError(f"`python -m {PACKAGE}.info` should say {pattern!r}")
        self._compare_libraries("after the installation")

    def _compare_libraries(self, when: str) -> None:
        """The files are those of the wheel, or as many as there should be."""
        files = sorted(self._package().glob("*.so"))
        found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        self.result.libraries = found
        if self.plan.is_built_once:
            expected = dict(self.artifacts.libraries)
            if "numpy module" in self.plan.without:
                expected = {
                    name: digest for name, digest in expected.items() if "numpy" not in name
                }
            if found != expected:
                raise StepError(f"{when} the libraries are not those of the wheel")
        elif bool(found) != self.plan.is_native:
            raise StepError(f"{when} there are {sorted(found)}")

    def _test(self, tests: Tests) -> None:
        file = self.folder / "junit.xml"
        file.unlink(missing_ok=True)
        command = [str(self.python), "-m", "pytest", "-q", f"--junitxml={file}", *tests.arguments]
        code = self._start(command, self._variables() | tests.variables, self.artifacts.tree)
        failed = self.result.counts.failed
        if file.exists():
            self.result.counts.add(file)
        failed = self.result.counts.failed - failed
        if failed:
            raise StepError(f"{failed} tests failed: see {self.log}")
        if code != 0:
            raise StepError(f"pytest ended with {code}: see {self.log}")

    def _package(self) -> Path:
        (folder,) = self.folder.glob(f"lib/python*/site-packages/{PACKAGE}")
        return folder

    def _variables(self) -> dict[str, str]:
        """The environment variables of this process, but for what the plan takes away."""
        variables = {name: value for name, value in os.environ.items() if name not in UNSET}
        bin_folder = str(self.python.parent)
        bare = "compiler" in self.plan.without
        variables["PATH"] = bin_folder if bare else f"{bin_folder}:{os.environ['PATH']}"
        variables.pop("METAPOOL_BUILD_CUDA", None)
        # A missing NumPy module counts as a missing library.
        whole = self.plan.is_native and "numpy module" not in self.plan.without
        variables["METAPOOL_REQUIRE_NATIVE"] = "1" if whole else "0"
        return variables

    def _pip(self, *arguments: str, variables: dict[str, str] | None = None) -> None:
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--no-input", *arguments]
        self._run(command, self._variables() | (variables or {}))

    def _run(self, command: list[str], variables: dict[str, str] | None = None) -> str:
        """What the command prints; an error if it fails."""
        start = self.log.stat().st_size
        code = self._start(command, variables or self._variables(), self.log.parent)
        said = self.log.read_bytes()[start:].decode(errors="replace")
        if code != 0:
            last = said.strip().splitlines()[-1:] or ["it says nothing"]
            raise StepError(f"{' '.join(command[:6])} failed: {last[0]} (see {self.log})")
        return said

    def _start(self, command: list[str], variables: dict[str, str], folder: Path) -> int:
        with self.log.open("a") as output:
            return subprocess.run(
                command, cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT,
                check=False,
            ).returncode  # fmt: skip


def check_all(
    plans: list[Plan], artifacts: Artifacts, work: Path, keep: bool, jobs: int
) -> Iterator[Result]:
    """So many environments at a time, in their order; each takes gigabytes of disk."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda plan: Environment(plan, artifacts, work).check(keep), plans)
