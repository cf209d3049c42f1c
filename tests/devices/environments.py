"""``python -m tests.devices.environments openvino ncnn``: targets tested where they are installed.

Converters and runtimes want versions of their own of many packages, and their native libraries
clash. So each has a virtual environment under ``build/devices``, which sees the packages of the one
that this runs in behind its own: PyTorch is there once. Without names it takes all targets.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

from metapool_kernels.devices.registry import NAMES, extra, target_names
from tests.checked.results import FRESH, ROOT

WORK = ROOT / "build" / "devices"


def by_extra(names: list[str]) -> dict[str, list[str]]:
    """Targets that are installed together, by the extra that does it."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(extra(name), []).append(name)
    return found


def make(folder: Path) -> Path:
    """An environment over this one; what is there already stays. Returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, symlinks=True)
    below = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text("\n".join(below) + "\n")
    return python


def check(name: str, targets: list[str]) -> str:
    """Install an extra and test its targets; what went wrong, if anything did."""
    python = str(make(WORK / name))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-input"]
    if subprocess.run([*pip, f"metapool_kernels[{name}]"], check=False).returncode:
        return "not installed"
    environment = {**os.environ, "METAPOOL_DEVICE": " ".join(targets)}
    report = FRESH / f"test-devices-{name}.xml"
    tests = [python, "-m", "pytest", "-m", "devices", "tests/devices", f"--junitxml={report}"]
    done = subprocess.run(tests, cwd=ROOT, env=environment, check=False)
    return f"pytest ended with {done.returncode}" if done.returncode else ""


def main(names: list[str]) -> int:
    """Number of environments in which something went wrong."""
    problems = {}
    for name, targets in by_extra(target_names(names or NAMES)).items():
        print(f"== {', '.join(targets)}", flush=True)
        problems[name] = check(name, targets)
    for name, problem in problems.items():
        print(f"{name}: {problem or 'passed'}")
    return sum(map(bool, problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
