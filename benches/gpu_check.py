"""``make gpu-check``: everything that only a GPU can tell, by one command and without a network.

It builds, sends the correctness suite to the GPU, runs what only a GPU can show, the compute
sanitizer and the benchmarks against all peers, and leaves one JSON and one Markdown file under
benches/results. With ``--dry-run`` it does the same on the CPU, tiny, in Triton's interpreter.
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


def steps(dry_run: bool, speed: Path) -> Iterator[Step]:
    """All of them, in order."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    suite = ["tests/test_forward.py", "tests/test_backward.py", "tests/test_double_backward.py"]
    where = {"TRITON_INTERPRET": "1"} if dry_run else {"METAPOOL_TEST_DEVICE": "cuda"}
    share = {"METAPOOL_TEST_SHARE": "0.002" if dry_run else "0.01"}
    if not dry_run:
        yield Step("build", [*python, "setup.py", "build_ext", "--inplace"], 150)
    yield Step("suite", [*pytest, *suite], 150, where | share)
    yield Step("gpu tests", [*pytest, "tests/test_on_gpu.py"], 120, where)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not dry_run and Path(sanitizer).exists():
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, suite[0]]
            few = {"METAPOOL_TEST_SHARE": "0.003"}
            yield Step(tool, command, 60, where | few)
    device = ["--device", "cpu"] if dry_run else []
    command = [*python, "-m", "benches.gpu_speed", "--out", str(speed), *device]
    yield Step("speed", [*command, "--seconds", "180"], 240, where)


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
        "device": "CPU, in Triton's interpreter",
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
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU here; rehearse with --dry-run", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"facts": facts(), "steps": [], "speed": []}
    slug = re.sub(r"[^a-z0-9]+", "-", report["facts"]["device"].lower()).strip("-")
    folder = arguments.out or RESULTS / slug
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        speed = Path(scratch) / "speed.json"
        for step in steps(arguments.dry_run, speed):
            report["steps"].append(run(step))
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
