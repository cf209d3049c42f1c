"""Where the interpreters of other versions of Python are."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
THIS = f"{sys.version_info.major}.{sys.version_info.minor}{'t' * FREE_THREADED}"


def find(version: str) -> str | None:
    """An interpreter of a version such as "3.12", or None: this one, on PATH or pyenv's.

    One without the global lock is that of another version, such as "3.14t".
    """
    return next((path for path in _places(version) if _is(path, version)), None)


def _places(version: str) -> Iterator[str]:
    if version == THIS:
        yield sys.executable
    if path := shutil.which(f"python{version}"):
        yield path
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = (root / "versions").glob(f"{version.removesuffix('t')}.*")
    yield from (str(path / "bin/python") for path in sorted(found, key=_number, reverse=True))


def _number(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split(".") if part.isdigit())


def _is(path: str, version: str) -> bool:
    """A shim of pyenv is on PATH for every version, and runs those alone that are switched on."""
    code = (
        "import sys, sysconfig, venv, ensurepip; print('%d.%d' % sys.version_info[:2] + "
        "'t' * bool(sysconfig.get_config_var('Py_GIL_DISABLED')))"
    )
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == version
