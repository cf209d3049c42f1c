"""``make gpu-pack``: what a GPU machine would have to build or fetch, made here and carried there.

The libraries of the torch ops and of the CUDA kernels know no version of Python, and load under
every torch from 2.10 on. They lie in ``build/gpu-pack`` with a note of what they were made from;
:func:`install` puts them into the package if they fit what is there.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACK = ROOT / "build" / "gpu-pack"
PACKAGE = ROOT / "metapool_kernels"
LIBRARIES = {"torch_ops": "_torch_ops.so", "cuda": "_torch_ops_cuda.so"}
BUILD_FILE, NOTE, SITE = "_build.json", "pack.json", "site"
CARRIED = ("jsonargparse",)
"""Packages in plain Python that a step of the search needs, and a machine for kernels has not."""

_SOURCES = ("csrc", "python_bindings", "setup.py")


def fingerprint() -> str:
    """Of all that the libraries are made from."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def make(archs: str) -> None:
    """Build the libraries for some GPUs, and lay them down with all that is carried."""
    shutil.rmtree(PACK, ignore_errors=True)
    built = ROOT / "build" / "gpu-pack-lib"
    asked = {"METAPOOL_BUILD_CUDA": "1", "METAPOOL_CUDA_ARCHS": archs}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(built)]
    subprocess.run(command, cwd=ROOT, env=os.environ | asked, check=True)
    PACK.mkdir(parents=True)
    for library in LIBRARIES.values():
        _strip(built / PACKAGE.name / library, PACK / library)
    facts: dict[str, Any] = json.loads((built / PACKAGE.name / BUILD_FILE).read_text())
    facts["numpy_ops"] = {"skipped": "it is for one version of Python, and was not packed"}
    (PACK / BUILD_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(PACK / SITE), *CARRIED], check=True)
    note = {
        "sources": fingerprint(),
        "commit": _git("describe", "--always", "--dirty=, with changes"),
        "architectures": facts["cuda"]["architectures"],
        "machine": platform.machine(),
    }
    (PACK / NOTE).write_text(json.dumps(note, indent=2) + "\n")
    size = sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file())
    print(
        f"{PACK.relative_to(ROOT)}: {size / 2**20:.1f} MiB for {', '.join(note['architectures'])}"
    )


def _strip(source: Path, target: Path) -> None:
    """A copy without what only a debugger reads, where there is a tool for that."""
    if shutil.which("strip") is None:
        shutil.copy(source, target)
        return
    subprocess.run(["strip", "--strip-unneeded", "-o", str(target), str(source)], check=True)


def problem(capability: str) -> str | None:
    """Why the pack cannot be used on a GPU such as "90", or None."""
    if not (PACK / NOTE).exists():
        return f"there is none in {PACK.relative_to(ROOT)}; `make gpu-pack` makes one"
    note = json.loads((PACK / NOTE).read_text())
    if note["machine"] != platform.machine():
        return f"it is for {note['machine']}, and this is {platform.machine()}"
    if note["sources"] != fingerprint():
        return "the sources have changed since it was made; `make gpu-pack` makes it anew"
    if f"sm_{capability}" not in note["architectures"]:
        return f"it is for {', '.join(note['architectures'])}, and the GPU is sm_{capability}"
    return None


def install() -> None:
    """Put the libraries into the package."""
    for name in (*LIBRARIES.values(), BUILD_FILE):
        # A library that another process has loaded must not change under it.
        (PACKAGE / name).unlink(missing_ok=True)
        shutil.copy(PACK / name, PACKAGE / name)


def commit() -> str:
    """Of the sources: git's, or where there is no repository that of the pack."""
    here = _git("describe", "--always", "--dirty=, with changes")
    if here != "unknown" or not (PACK / NOTE).exists():
        return here
    note: dict[str, str] = json.loads((PACK / NOTE).read_text())
    return note["commit"]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def main() -> None:
    """Make the pack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--archs", default="90", help="as in METAPOOL_CUDA_ARCHS; 90 is an H100")
    make(parser.parse_args().archs)


if __name__ == "__main__":
    main()
