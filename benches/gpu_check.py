"""``make gpu-check``: everything that only a GPU can tell, by one command and without a network.

It builds, sends the correctness suite to the GPU, runs what only a GPU can show, the compute
sanitizer and the benchmarks against all peers, with the kernels in Triton and those in CUDA side
by side, and leaves one JSON and one Markdown file under benches/results. With ``--dry-run`` it does
the same on the CPU, tiny: Triton in its interpreter, CUDA by tests/cuda_host. Where the time on a
GPU is short, ``--only`` runs some of the steps; those that ran at the same commit stay in the
report.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Step:
    """A program to run, and how long it may take."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)


_HOST_LIBRARY = Path("build/cuda_host/_torch_ops_cuda_host.so")
_SUITE = [f"tests/test_{name}.py" for name in ("forward", "backward", "double_backward")]
_SHARES = {"triton": 0.01, "cuda": 0.2}
"""Of the suite. Triton compiles a kernel for nearly every test."""


def steps(dry_run: bool, speed: Path) -> Iterator[Step]:
    """All of them, in order."""
    return _rehearsal(speed) if dry_run else _on_gpu(speed)


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def _speed(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benches.gpu_speed", "--out", str(out), *arguments]


def _on_gpu(speed: Path) -> Iterator[Step]:
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    asked = {"METAPOOL_BUILD_CUDA": "1", "METAPOOL_CUDA_ARCHS": architecture}
    yield Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240, asked)
    there = {"METAPOOL_TEST_DEVICE": "cuda", "METAPOOL_REQUIRE_NATIVE": "1"}
    for backend, share in _SHARES.items():
        environment = there | {"METAPOOL_TEST_SHARE": str(share)}
        yield Step(f"suite, {backend}", _pytest("-k", backend, *_SUITE), 150, environment)
    yield Step("gpu tests", _pytest("tests/test_on_gpu.py"), 120, there)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists():
        for backend, share in _SHARES.items():
            few = there | {"METAPOOL_TEST_SHARE": str(share / 8)}
            for tool in ("memcheck", "racecheck"):
                command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
                command += _pytest("-k", backend, *_SUITE[:2])
                yield Step(f"{tool}, {backend}", command, 60, few)
    yield Step("speed", _speed(speed, "--seconds", "120"), 180, there)


def _rehearsal(speed: Path) -> Iterator[Step]:
    yield Step("build", [sys.executable, "-m", "tests.cuda_host.build"], 240)
    triton_there = {"TRITON_INTERPRET": "1"}
    cuda_there = {"METAPOOL_CUDA_HOST": str(_HOST_LIBRARY.resolve())}
    for backend, where in (("triton", triton_there), ("cuda", cuda_there)):
        few = where | {"METAPOOL_TEST_SHARE": str(_SHARES[backend] / 5)}
        yield Step(f"suite, {backend}", _pytest("-k", backend, *_SUITE), 150, few)
        yield Step(f"gpu tests, {backend}", _pytest("tests/test_on_gpu.py"), 60, where)
    command = _speed(speed, "--device", "cpu", "--seconds", "120")
    yield Step("speed", command, 240, triton_there | cuda_there)


def run(step: Step) -> dict[str, Any]:
    """Run a step and say how it ended; one that fails does not keep the others from running."""
    print(f"== {step.name}", flush=True)
    began = time.perf_counter()
    try:
        done = subprocess.run(
            step.command,
            env=os.environ | step.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=step.seconds,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code, output = 124, (late.stdout or b"").decode(errors="replace")
    print(output[-3000:], flush=True)
    took = time.perf_counter() - began
    return {"step": step.name, "exit": code, "seconds": took, "output": output[-6000:]}


def facts() -> dict[str, str]:
    """What stands above the figures."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "python": sys.version.split()[0],
        "device": "CPU, a rehearsal",
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _earlier(path: Path, now: dict[str, str]) -> dict[str, Any] | None:
    """The report that is there, if it is about the same things."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found["facts"] == now else None


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# GPU check", ""]
    lines += [f"- {name}: {value}" for name, value in report["facts"].items()]
    lines += ["", "| step | exit | seconds |", "|---|---|---|"]
    lines += [f"| {s['step']} | {s['exit']} | {s['seconds']:.0f} |" for s in report["steps"]]
    names = list(dict.fromkeys(n for row in report["speed"] for n in row.get("seconds", {})))
    lines += ["", "Milliseconds, medians of calls that were taken in turn.", ""]
    lines += ["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in report["speed"]:
        times = row.get("seconds", {})
        cells = [f"{times[n] * 1e3:.3f}" if n in times else "" for n in names]
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
        if "error" in row:
            lines.append(f"| {row['case']} | {row['error'].splitlines()[0]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all steps; the exit code says whether all of them succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="steps whose names begin so")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU here; rehearse with --dry-run", file=sys.stderr)
        return 2
    now = facts()
    slug = re.sub(r"[^a-z0-9]+", "-", now["device"].lower()).strip("-")
    folder = arguments.out or RESULTS / slug
    report = _earlier(folder / "gpu-check.json", now) or {"facts": now, "steps": [], "speed": []}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        speed = Path(scratch) / "speed.json"
        for step in steps(arguments.dry_run, speed):
            if arguments.only and not step.name.startswith(tuple(arguments.only)):
                continue
            others = [done for done in report["steps"] if done["step"] != step.name]
            report["steps"] = [*others, run(step)]
            if speed.exists():
                report["speed"] = json.loads(speed.read_text())
            (folder / "gpu-check.json").write_text(json.dumps(report, indent=1))
            (folder / "gpu-check.md").write_text(page(report))
    failed = [s["step"] for s in report["steps"] if s["exit"] != 0]
    failed += ["speed"] * any("error" in row for row in report["speed"])
    print((folder / "gpu-check.md").read_text())
    print(f"failed: {', '.join(failed)}" if failed else "all steps succeeded")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
