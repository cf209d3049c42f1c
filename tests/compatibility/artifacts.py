"""The source distribution and the wheel: built once, and what is in them."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path, PurePosixPath

from metapool_kernels.version import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = "metapool_kernels"

# What serves the repository and not the source.
NOT_SHIPPED = (".ci", ".gitignore")
# What setuptools adds.
ADDED = ("PKG-INFO", "setup.cfg", f"{PACKAGE}.egg-info")


class ArtifactError(Exception):
    """The distribution cannot be built, or holds what it should not."""


@dataclass(frozen=True)
class Artifacts:
    """What is installed in the environments, and what the tests are run from."""

    sdist: Path
    wheel: Path
    tree: Path
    """The unpacked source distribution without the package, so that tests import what is
    installed."""

    @property
    def libraries(self) -> dict[str, str]:
        """The compiled libraries of the wheel by name, each with its SHA-256."""
        with zipfile.ZipFile(self.wheel) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".so")]
            return {
                PurePosixPath(name).name: hashlib.sha256(wheel.read(name)).hexdigest()
                for name in names
            }

    @property
    def requirements(self) -> list[str]:
        """What the wheel asks for, each with the extra it belongs to."""
        with zipfile.ZipFile(self.wheel) as wheel:
            (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
            metadata = message_from_bytes(wheel.read(name))
        return [str(value) for value in metadata.get_all("Requires-Dist", [])]


def lowest(requirements: Iterable[str]) -> list[str]:
    """Constraints for pip that hold each package at the lowest version that is allowed.

    Torch is left out, whose version the plan says, and so is what is pinned already.
    """
    pattern = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?\s*>=\s*(?P<version>[\d.]+)")
    found = [match for match in map(pattern.match, requirements) if match]
    held = {f"{match['name']}=={match['version']}" for match in found if match["name"] != "torch"}
    return sorted(held)


def build(folder: Path, log: Path, *, in_place: bool = False) -> Artifacts:
    """Build both into ``folder``; the wheel from the source distribution, in this environment.

    ``in_place`` makes the wheel of this tree, where the kernels are compiled already.
    """
    for name in ("clone", "dist", "tree"):
        shutil.rmtree(folder / name, ignore_errors=True)
    names = tracked()
    for name in names:
        target = folder / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    # Left over from a build in place: these have to stay out of what is shipped.
    for name in ("_build.json", "_torch_ops.so"):
        (folder / "clone" / PACKAGE / name).write_text("left over")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    dist = folder / "dist"
    dist.mkdir()
    _run([sys.executable, "-c", code, str(dist)], folder / "clone", log)
    sdist = _only(dist, "*.tar.gz")
    check_sdist(sdist, names)
    # pip keeps what it has built from a path, and would take that for what lies there now.
    pip = [sys.executable, "-m", "pip", "--no-cache-dir", "wheel", "--no-deps"]
    pip += ["--no-build-isolation"]
    if in_place:  # modules that are gone are kept there from an earlier build
        for library in (ROOT / "build").glob("lib*"):
            shutil.rmtree(library)
    _run([*pip, "--wheel-dir", str(dist), str(ROOT if in_place else sdist)], folder, log)
    wheel = _only(dist, "*.whl")
    check_wheel(wheel, names)
    return Artifacts(sdist, wheel, unpack(sdist, folder))


def reuse(folder: Path) -> Artifacts:
    """What an earlier :func:`build` left in ``folder``."""
    dist = folder / "dist"
    sdist = _only(dist, "*.tar.gz")
    return Artifacts(sdist, _only(dist, "*.whl"), unpack(sdist, folder))


def unpack(sdist: Path, folder: Path) -> Path:
    """The source distribution without the package, in ``folder``."""
    shutil.rmtree(folder / "tree", ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "tree", filter="data")
    tree = _only(folder / "tree", "*")
    shutil.rmtree(tree / PACKAGE)
    return tree


def tracked() -> list[str]:
    """Paths of the files that git tracks and that are there."""
    command = ["git", "ls-files", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ArtifactError(f"{ROOT} should be a clone: {error}") from error
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def check_sdist(sdist: Path, names: list[str]) -> None:
    """Raise unless it holds just what git tracks."""
    with tarfile.open(sdist) as archive:
        paths = [PurePosixPath(member.name) for member in archive if member.isfile()]
    found = {path.relative_to(path.parts[0]) for path in paths}
    _compare(
        sdist,
        {path for path in found if path.parts[0] not in ADDED},
        {path for name in names if (path := PurePosixPath(name)).parts[0] not in NOT_SHIPPED},
    )


def check_wheel(wheel: Path, names: list[str]) -> None:
    """Raise unless it holds the package, how it was built, and compiled libraries for it."""
    with zipfile.ZipFile(wheel) as archive:
        paths = {PurePosixPath(name) for name in archive.namelist()}
    metadata = f"{PACKAGE}-{__version__}.dist-info"
    found = {path for path in paths if path.parts[0] != metadata and path.suffix != ".so"}
    expected = {path for name in names if (path := PurePosixPath(name)).parts[0] == PACKAGE}
    _compare(wheel, found, expected | {PurePosixPath(PACKAGE, "_build.json")})
    for name in ("LICENSE", "METADATA", "entry_points.txt"):
        if not [path for path in paths if path.parts[0] == metadata and path.name == name]:
            raise ArtifactError(f"{wheel.name} has no {name}")


def _compare(archive: Path, found: set[PurePosixPath], expected: set[PurePosixPath]) -> None:
    for what, paths in (("lacks", expected - found), ("should not hold", found - expected)):
        if paths:
            raise ArtifactError(f"{archive.name} {what} {', '.join(sorted(map(str, paths)))}")


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise ArtifactError(f"{folder} should hold one {pattern}, got {len(found)}")
    return found[0]


def _run(command: list[str], folder: Path, log: Path) -> None:
    with log.open("a") as output:
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=output,
            stderr=output,
            check=False,
            env=os.environ | {"PYTHONPATH": ""},
        )
    if done.returncode != 0:
        raise ArtifactError(f"{' '.join(command)} failed: see {log}")
