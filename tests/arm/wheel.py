"""A wheel for AArch64, compiled here and tried in an emulator: `python -m tests.arm.wheel`.

Debian's Python for AArch64 has the headers and the settings that a build asks for. In the emulator
it then imports the wheel, beside a torch for AArch64, and compares the kernels with the definition.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.arm.build import COMPILER, EMULATOR, find_problem
from tests.checked.results import record
from tests.compatibility import artifacts
from tests.compatibility.environments import PROBE

FOLDER = artifacts.ROOT / "build" / "arm-wheel"
SYSROOT, SITE, TREE = FOLDER / "sysroot", FOLDER / "site", FOLDER / "tree"
LOG = FOLDER / "build.log"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
"""Of this version is the wheel: that of Debian, on which this runs."""

DEBIAN = [
    *(f"{PYTHON}-minimal", f"lib{PYTHON}-minimal", f"lib{PYTHON}-stdlib", f"lib{PYTHON}-dev"),
    *("libc6", "libstdc++6", "libgcc-s1", "libgomp1", "zlib1g", "libexpat1", "libffi8", "libssl3"),
    *("libbz2-1.0", "liblzma5", "libsqlite3-0", "libuuid1"),
]
# The oldest torch that is supported, whose wheel for AArch64 holds no CUDA, and what it imports.
PACKAGES = [
    *("torch==2.10.0", "numpy", "typing_extensions", "filelock", "fsspec", "networkx"),
    *("sympy", "mpmath", "jinja2", "markupsafe"),
]


def run(*command: str | Path, folder: Path = FOLDER, **variables: str) -> str:
    """What a command prints, started in a folder, with these environment variables.

    Raises:
        RuntimeError: it fails; with the end of what it said.
    """
    done = subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(map(str, command[:4]))}: {(done.stdout + done.stderr)[-2000:]}"
        )
    return done.stdout


def fetch_python() -> None:
    """Debian's Python for AArch64 into SYSROOT; the packages of this machine stay as they are."""
    lists, cache, debs = (FOLDER / name for name in ("lists", "cache", "debs"))
    for folder in (lists / "partial", cache / "archives/partial", debs):
        folder.mkdir(parents=True, exist_ok=True)
    settings = (
        *(f"Dir::State::lists={lists}", f"Dir::Cache={cache}", "APT::Sandbox::User=root"),
        *("APT::Architecture=arm64", "APT::Architectures=arm64"),
    )
    options = [f"-o{setting}" for setting in settings]
    run("apt-get", *options, "update")
    run("apt-get", *options, "download", *DEBIAN, folder=debs)
    for package in debs.glob("*.deb"):
        run("dpkg-deb", "-x", package, SYSROOT)


def fetch_torch() -> None:
    """A torch for AArch64 into SITE."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", SITE]
    command += ["--only-binary=:all:", "--python-version", PYTHON.removeprefix("python")]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
    run(*command, *platforms, "--platform=manylinux2014_aarch64", *PACKAGES)


def build_wheel() -> Path:
    """The wheel, of what git tracks, as setuptools leaves it."""
    for name in artifacts.tracked():
        target = TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(artifacts.ROOT / name, target)
    settings = "_sysconfigdata__aarch64-linux-gnu"
    (FOLDER / "settings").mkdir(exist_ok=True)
    shutil.copy(SYSROOT / f"usr/lib/{PYTHON}/{settings}.py", FOLDER / "settings")
    include = SYSROOT / "usr/include"
    shutil.rmtree(FOLDER / "dist", ignore_errors=True)
    run(
        *(sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", FOLDER / "dist"),
        folder=TREE,
        CXX=COMPILER,
        METAPOOL_ISAS="baseline",
        METAPOOL_BUILD_CUDA="0",
        # Before those of this machine's Python and torch.
        METAPOOL_CXXFLAGS=f"-I{include / PYTHON} -I{include} -L{SITE / 'torch/lib'}",
        PYTHONPATH=str(FOLDER / "settings"),
        _PYTHON_HOST_PLATFORM="linux-aarch64",
        _PYTHON_SYSCONFIGDATA_NAME=settings,
    )
    (wheel,) = (FOLDER / "dist").glob("*.whl")
    return wheel


def try_wheel(wheel: Path) -> str:
    """Import it in the emulator; returns what it says of itself.

    Raises:
        RuntimeError: it does not load, or is not right.
    """
    shutil.rmtree(SITE / artifacts.PACKAGE, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(SITE)
    command = [EMULATOR, "-L", SYSROOT, SYSROOT / "usr/bin" / PYTHON, "-S", PROBE]
    facts = json.loads(run(*command, PYTHONPATH=str(SITE)).splitlines()[-1])
    info: str = facts["info"]
    if not facts["is_right"] or facts["numpy_problem"] or "usable on cpu" not in info:
        raise RuntimeError(f"{wheel.name} is not right: {json.dumps(facts, indent=2)}")
    return info


def main() -> None:
    if problem := find_problem():
        raise SystemExit(problem)
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        if not SYSROOT.exists():
            fetch_python()
        if not SITE.exists():
            fetch_torch()
        wheel = artifacts.for_other_machines(build_wheel(), artifacts.ROOT / "dist", LOG)
        artifacts.check_wheel(wheel, artifacts.tracked())
        info = try_wheel(wheel)
    except (RuntimeError, artifacts.ArtifactError) as error:
        raise SystemExit(str(error)) from None
    brief = f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, loads and is right"
    record("wheel-arm", brief, ok=True)
    print(f"{info}\n{brief}")


if __name__ == "__main__":
    main()
