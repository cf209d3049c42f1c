"""The CPU kernels for AArch64, and for this machine to compare: `python -m tests.arm.build`.

Of each there are two programs: sweep.cpp with the kernels, which setup.py's flags compile, and
words.cpp for each instruction set.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests import setup_script

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "arm"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
PACKAGES = "g++-aarch64-linux-gnu qemu-user-static"


def find_problem() -> str | None:
    """Why nothing is compiled for AArch64 and run here, if so."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not found (Debian: apt-get install {PACKAGES})"


class Programs:
    """A graph with programs in it, of the sources under ``root``."""

    def __init__(self, script: ModuleType, compiler: str, root: Path, flags: Sequence[str]) -> None:
        script.ROOT = root
        self.graph = script.Graph(compiler)
        self.graph.extra += flags
        # What setup.py links is a library.
        command = f"{compiler} $in -o $out $libraries"
        self.graph.lines += ["rule program", f"  command = {command}"]
        self._script = script

    def add(self, program: Path, source: str, objects: Sequence[str] = ()) -> None:
        """Compile a source, and link it with objects."""
        self.graph.link([self.graph.compile(source), *objects], program, "-static", rule="program")

    def add_words(self, program: Path, flags: Sequence[str]) -> None:
        """words.cpp for the instruction set that the flags stand for."""
        name = f"{program.name}.o"
        source = self._script.escape(self._script.ROOT / "tests/arm/words.cpp")
        every = [*self._script.COMMON_FLAGS, *self._script.KERNEL_FLAGS, *flags]
        joined = shlex.join([*every, "-DMETAPOOL_ISA=words", *self.graph.extra])
        self.graph.lines += [f"build {name}: compile {source}", f"  flags = {joined}"]
        self.graph.link([name], program, "-static", rule="program")

    def build(self, folder: Path) -> None:
        """Make all of them.

        Raises:
            RuntimeError: the compiler or the linker fails.
        """
        self.graph.write(folder)
        run_ninja(self._script.find_ninja(), folder)


def run_ninja(ninja: str, folder: Path, *targets: str) -> None:
    """Build targets, or all.

    Raises:
        RuntimeError: with what was printed.
    """
    command = [ninja, "-C", str(folder), *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stdout)


def build_for_arm(root: Path, folder: Path, flags: Sequence[str] = ()) -> Path:
    """The sources under ``root`` for AArch64; ``flags`` come last. Returns the sweep."""
    script = setup_script.load()
    script.X86_ISAS = {}
    programs = Programs(script, COMPILER, root, flags)
    objects, _ = script.kernel_objects(programs.graph)
    programs.add(folder / "sweep", "tests/arm/sweep.cpp", objects)
    programs.add_words(folder / "words", ())
    programs.build(folder)
    return folder / "sweep"


def build_for_here(folder: Path) -> Path:
    """The same for this machine, with the kernels that setup.py has compiled; returns the sweep."""
    script = setup_script.load()
    compiler, ninja = script.find_compiler(), script.find_ninja()
    objects, isas = script.kernel_objects(script.Graph(compiler))
    compiled = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    run_ninja(ninja, compiled, *objects)
    programs = Programs(script, compiler, ROOT, ())
    programs.add(
        folder / "sweep", "tests/arm/sweep.cpp", [str(compiled / name) for name in objects]
    )
    for name in isas:
        programs.add_words(folder / f"words_{name}", script.X86_ISAS.get(name, ()))
    programs.build(folder)
    return folder / "sweep"


def build(root: Path, folder: Path, flags: Sequence[str] = ()) -> Path:
    """Both, in ``here`` what is for this machine; returns the sweep for AArch64."""
    build_for_here(folder / "here")
    return build_for_arm(root, folder, flags)


def main() -> None:
    if problem := find_problem():
        if os.environ.get("CI"):
            raise SystemExit(problem)
        print(f"nothing is built for AArch64: {problem}")
        return
    try:
        print(build(ROOT, FOLDER))
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
