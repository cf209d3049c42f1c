"""What is run, in which order, and for how long."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from benches.gpu_check import pack, plugin
from benches.gpu_check.figures import GPU_BACKENDS
from benches.gpu_check.runner import Program, Step
from tests.rooms import file_of

_SUITE = tuple(file_of(f"op/{name}") for name in ("forward", "backward", "double_backward"))
_HOST_LIBRARY = pack.ROOT / "build/cuda_host/_torch_ops_cuda_host.so"
_BUILDING = 300
"""Seconds for libraries that have to be built, which is no part of the time that is promised."""
_SANITIZER = {
    "alarm": r"^=========.*(Invalid|Error|Race reported|Uninit|SUMMARY: [1-9])",
    "promise": r"========= .*SUMMARY: 0",
}
_OURS = {"triton": "meta_pool", "cuda": "metapool"}
"""What the names of the kernels hold, by backend."""


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
            Step("kernels", 75, (*self._kernels(self.cores), self._triage("cuda"))),
            Step("triage", 45, (self._triage("triton"),)),
            Step("figures", 170, (self._measuring("figures"), *self._more_kernels())),
            Step("network", 60, (self._measuring("network"),)),
            Step("first step", 65, (self._measuring("first_step"),)),
            Step("breadth", 75, tuple(self._breadth())),
        ]
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if self.capability is None or Path(sanitizer).exists():
            found.append(Step("sanitizer", 45, tuple(self._sanitized(sanitizer))))
        return found

    def _there(self, backend: str | None) -> dict[str, str]:
        """Where a backend runs: on the GPU, or in a rehearsal in place of one."""
        if self.capability is not None:
            return {"METAPOOL_TEST_DEVICE": "cuda", "METAPOOL_REQUIRE_NATIVE": "1"} | _carried()
        triton, cuda = {"TRITON_INTERPRET": "1"}, {"METAPOOL_CUDA_HOST": str(_HOST_LIBRARY)}
        if backend is None:
            return {**triton, **cuda}
        return triton if backend == "triton" else cuda

    def _module(self, name: str, *arguments: str) -> tuple[str, ...]:
        device = ("--device", "cuda" if self.capability else "cpu")
        return (sys.executable, "-m", f"benches.gpu_check.{name}", *arguments, *device)

    def _measuring(self, name: str) -> Program:
        return Program(name, self._module(name), self._there(None), patience=60, measures=True)

    def _libraries(self) -> Program:
        asked = ("--capability", self.capability) if self.capability else ()
        command = (sys.executable, "-m", "benches.gpu_check.library", *asked)
        return Program("libraries", command, patience=_BUILDING)

    def _kernels(self, parts: int) -> list[Program]:
        """They compile, and neither interpret nor touch the GPU, on which others measure."""
        there = _carried() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        asked = ("--capability", self.capability) if self.capability else ()
        found = []
        for part in range(parts):
            split = ("--part", str(part), "--parts", str(parts))
            command = self._module("kernels", *split, *asked)
            found.append(Program(f"kernels {part}", command, there, patience=75))
        return found

    def _more_kernels(self) -> list[Program]:
        """What was not reached before is compiled beside the figures, on other cores."""
        return self._kernels(self.cores - 4) if self.capability and self.cores > 4 else []

    def _triage(self, backend: str) -> Program:
        command = self._module("triage", backend)
        return Program(f"triage, {backend}", command, self._there(backend), patience=45)

    def _pytest(self, title: str, backend: str, *arguments: str) -> Program:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
        command += ("-p", plugin.__name__, "--of-backend", backend, *arguments)
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
                found.append(self._pytest(f"suite, {backend} {part}", backend, split, *_SUITE))
            title = f"on a GPU, {backend}"
            found.append(self._pytest(title, backend, "tests/cuda/test_on_gpu.py"))
        return found

    def _sanitized(self, sanitizer: str) -> list[Program]:
        """The triage of small maps under each tool, whose kernels are there; else that alone."""
        found = []
        for backend in GPU_BACKENDS:
            command = self._module("triage", backend, "--small")
            there = self._there(backend)
            if self.capability is None:
                found.append(Program(f"no tool, {backend}", command, there, patience=45))
                continue
            for tool in ("memcheck", "racecheck"):
                options = ("--tool", tool, "--launch-timeout", "0")
                options += ("--kernel-regex", f"kns={_OURS[backend]}")
                if tool == "memcheck":  # else small tensors lie side by side in one allocation
                    options += ("--report-api-errors", "no")
                    there = there | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                tested = (sanitizer, *options, *command)
                found.append(Program(f"{tool}, {backend}", tested, there, 45, **_SANITIZER))
        return found


def _carried() -> dict[str, str]:
    """Packages that the pack brings."""
    site = pack.PACK / pack.SITE
    if not site.is_dir():
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(site))))}
