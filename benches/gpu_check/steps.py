"""What is run, in which order, and for how long."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from benches.gpu_check import pack, plugin
from benches.gpu_check.figures import GPU_BACKENDS
from benches.gpu_check.runner import Program, Step

_SUITE = tuple(f"tests/test_{name}.py" for name in ("forward", "backward", "double_backward"))
_HOST_LIBRARY = pack.ROOT / "build/cuda_host/_torch_ops_cuda_host.so"
_SANITIZER_ALARM = r"^========= +(Invalid|Error:|Warning:|Uninit|ERROR SUMMARY: [1-9])"
_BUILDING = 300
"""Seconds for libraries that have to be built, which is no part of the time that is promised."""


def steps(capability: str | None, failed: Mapping[str, list[str]]) -> list[Step]:
    """All of them.

    Args:
        capability: of the GPU, such as "90"; None for a rehearsal on the CPU.
        failed: by step, rows that failed in an earlier run, to come first where there is an order.
    """
    return _Plan(capability, failed).steps()


class _Plan:
    def __init__(self, capability: str | None, failed: Mapping[str, list[str]]) -> None:
        self.capability, self.failed = capability, failed
        self.cores = len(os.sched_getaffinity(0))

    def steps(self) -> list[Step]:
        is_packed = self.capability is not None and pack.problem(self.capability) is None
        found = [
            Step("libraries", 15 if is_packed else _BUILDING, (self._libraries(),)),
            Step("kernels", 50, (*self._kernels(self.cores), self._triage("cuda"))),
            Step("triage", 20, (self._triage("triton"),)),
            Step("figures", 200, (self._figures(), *self._more_kernels()), measures=True),
            Step("network", 50, (self._module("network", patience=45),), measures=True),
            Step("first step", 45, (self._module("first_step", patience=45),), measures=True),
            Step("breadth", 110, tuple(self._breadth())),
        ]
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.capability is None or Path(sanitizer).exists():
            found.append(Step("sanitizer", 60, tuple(self._sanitized(sanitizer))))
        return found

    def _there(self, backend: str | None) -> dict[str, str]:
        """Where a backend runs: on the GPU, or in a rehearsal in place of one."""
        if self.capability is not None:
            return {"METAPOOL_TEST_DEVICE": "cuda", "METAPOOL_REQUIRE_NATIVE": "1"} | _carried()
        triton, cuda = {"TRITON_INTERPRET": "1"}, {"METAPOOL_CUDA_HOST": str(_HOST_LIBRARY)}
        if backend is None:
            return {**triton, **cuda}
        return triton if backend == "triton" else cuda

    def _module(
        self,
        name: str,
        *arguments: str,
        backend: str | None = None,
        title: str | None = None,
        patience: float = 30,
    ) -> Program:
        device = ["--device", "cuda" if self.capability else "cpu"]
        command = (sys.executable, "-m", f"benches.gpu_check.{name}", *arguments, *device)
        return Program(title or name, command, self._there(backend), patience)

    def _libraries(self) -> Program:
        asked = ("--capability", self.capability) if self.capability else ()
        command = (sys.executable, "-m", "benches.gpu_check.library", *asked)
        return Program("libraries", command, patience=_BUILDING)

    def _kernels(self, parts: int) -> list[Program]:
        found = []
        for part in range(parts):
            split = ("--part", str(part), "--parts", str(parts))
            found.append(self._module("kernels", *split, title=f"kernels {part}", patience=60))
        # In the interpreter there is nothing to compile.
        return [_without(program, "TRITON_INTERPRET") for program in found]

    def _more_kernels(self) -> list[Program]:
        """What was not reached before is compiled beside the figures, on other cores."""
        return self._kernels(self.cores - 4) if self.capability and self.cores > 4 else []

    def _triage(self, backend: str) -> Program:
        return self._module("triage", backend, backend=backend, title=f"triage, {backend}")

    def _figures(self) -> Program:
        return self._module("figures", patience=45)

    def _pytest(self, title: str, backend: str, *arguments: str) -> Program:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
        command += ("-p", plugin.__name__, *arguments)
        environment = {
            **self._there(backend),
            plugin.FAILED_BEFORE: "\n".join(self.failed.get("breadth", [])),
        }
        if self.capability is None:
            environment["METAPOOL_TEST_SHARE"] = "0.002" if backend == "triton" else "0.01"
        return Program(title, command, environment, patience=60)

    def _breadth(self) -> list[Program]:
        """The suite, of Triton in as many processes as can compile at once."""
        parts = {"cuda": max(1, self.cores // 4), "triton": max(1, self.cores // 2)}
        found = []
        for backend in GPU_BACKENDS:
            for part in range(parts[backend]):
                split = f"--part-of={part}/{parts[backend]}"
                title = f"suite, {backend} {part}"
                found.append(self._pytest(title, backend, "-k", backend, split, *_SUITE))
            title = f"on a GPU, {backend}"
            found.append(self._pytest(title, backend, "-k", backend, "tests/test_on_gpu.py"))
        return found

    def _sanitized(self, sanitizer: str) -> list[Program]:
        """As many tests under each tool as the time allows; a rehearsal has the tests alone."""
        found = []
        for backend in GPU_BACKENDS:
            for tool in ("memcheck", "racecheck") if self.capability else ("none",):
                tests = self._pytest(f"{tool}, {backend}", backend, "-k", backend, *_SUITE[:2])
                command = tests.command
                if self.capability:
                    command = (sanitizer, "--tool", tool, *command)
                environment = tests.environment
                found.append(Program(tests.name, command, environment, 60, _SANITIZER_ALARM))
        return found


def _without(program: Program, variable: str) -> Program:
    environment = {k: v for k, v in program.environment.items() if k != variable}
    return Program(program.name, program.command, environment, program.patience)


def _carried() -> dict[str, str]:
    """Packages that the pack brings."""
    site = pack.PACK / pack.SITE
    if not site.is_dir():
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(site))))}
