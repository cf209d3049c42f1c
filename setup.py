"""Builds the native parts: the torch ops (LibTorch stable ABI) and the NumPy module (pybind11).

Whatever cannot be built here is left out with a reason, which `python -m metapool_kernels.info`
shows; the package then runs on plain PyTorch. Everything else of the packaging is in
pyproject.toml.

Environment:
    CXX                   the C++ compiler. Default: the first of c++, g++, clang++.
    METAPOOL_BUILD_NATIVE 0 leaves all native parts out.
    METAPOOL_CXXFLAGS     more compiler and linker flags, for instance for a sanitizer.
"""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The oldest torch whose stable ABI has what the bindings use; the binary loads in all later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"

COMMON_FLAGS = [
    *["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"],
    # Every instruction set has to give the same bits: no fused multiply-add, no reassociation.
    *["-ffp-contract=off", "-fno-math-errno"],
]
# Selections such as (a > b ? a : b) are vectorised only if comparisons need not trap.
KERNEL_FLAGS = ["-O3", "-fno-trapping-math"]
# GCC 12 warns of its own AVX-512 headers, which leave variables uninitialised on purpose.
KERNEL_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# Vectors are handed over by functions that are always inlined, so no calling convention matters.
KERNEL_FLAGS += ["-Wno-psabi"]
X86_ISAS = {
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": [
        *["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
        *["-mavx2", "-mf16c"],
        "-mprefer-vector-width=512",
    ],
}


class CannotBuildError(Exception):
    """A part is left out; the message says what was missing."""


def find_compiler() -> str:
    """The C++ compiler as a shell command; CXX may hold arguments, as in "ccache g++"."""
    if os.environ.get("METAPOOL_BUILD_NATIVE") == "0":
        raise CannotBuildError("METAPOOL_BUILD_NATIVE=0 switched the build off")
    commands = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in commands:
        words = shlex.split(command)
        if words and (path := shutil.which(words[0])):
            return shlex.join([path, *words[1:]])
    raise CannotBuildError(f"no C++ compiler was found (looked for {', '.join(commands)})")


def find_ninja() -> str:
    """Path of ninja, from its package or from the system."""
    if importlib.util.find_spec("ninja"):
        import ninja

        packaged = Path(ninja.BIN_DIR) / "ninja"
        if packaged.exists():
            return str(packaged)
    if path := shutil.which("ninja"):
        return path
    raise CannotBuildError("ninja was not found")


class Needs(NamedTuple):
    """What a part needs beside the kernels."""

    compile_flags: list[str]
    link_flags: list[str]
    about: dict[str, str]  # what to write down about it


def torch_needs() -> Needs:
    """What the torch ops need: torch's stable ABI, of which only C symbols are used."""
    if importlib.util.find_spec("torch") is None:
        raise CannotBuildError("torch was not installed where the package was built")
    import torch

    home = Path(torch.__file__).parent
    include = home / "include"
    if not (include / "torch/headeronly/core/MemoryFormat.h").exists():
        raise CannotBuildError(
            f"torch {torch.__version__} has no stable ABI headers; 2.10 is needed"
        )
    flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-isystem{include}"]
    about = {"torch_headers": torch.__version__, "torch_at_least": "2.10"}
    return Needs(flags, [f"-L{home / 'lib'}", "-ltorch_cpu"], about)


def numpy_needs() -> Needs:
    """What the NumPy module needs: pybind11 and Python's headers."""
    if importlib.util.find_spec("pybind11") is None:
        raise CannotBuildError("pybind11 was not installed where the package was built")
    import pybind11

    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").exists():
        raise CannotBuildError(f"Python's C headers were not found in {python}")
    flags = [f"-isystem{pybind11.get_include()}", f"-isystem{python}"]
    about = {"pybind11": pybind11.__version__, "python": platform.python_version()}
    return Needs(flags, [], about)


class Graph:
    """A ninja file: objects compiled once, linked into one or two shared libraries."""

    def __init__(self, compiler: str) -> None:
        extra = shlex.split(os.environ.get("METAPOOL_CXXFLAGS", ""))
        self.lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared {shlex.join(extra)} $in -o $out $libraries",
        ]
        self.extra = extra

    def compile(self, source: str, *flags: str) -> str:
        """Add an object; returns its name."""
        output = source.replace("/", "_") + ".o"
        joined = shlex.join([*COMMON_FLAGS, *flags, *self.extra])
        self.lines += [f"build {output}: compile {escape(ROOT / source)}", f"  flags = {joined}"]
        return output

    def link(self, objects: list[str], output: Path, *flags: str) -> None:
        """Add a shared library."""
        self.lines += [
            f"build {escape(output)}: link {' '.join(objects)}",
            f"  libraries = {shlex.join(flags)}",
        ]

    def run(self, ninja: str, folder: Path) -> None:
        """Build everything in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        subprocess.run([ninja, "-C", str(folder)], check=True)


def escape(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def kernel_objects(graph: Graph) -> tuple[list[str], list[str]]:
    """Add the framework-free kernels; returns their objects and their instruction sets."""
    isas = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {}
    defines = [f"-DMETAPOOL_HAS_{name.upper()}" for name in isas]
    objects = [
        graph.compile("csrc/cpu/dispatch.cpp", *defines),
        graph.compile("csrc/cpu/isa_baseline.cpp", *KERNEL_FLAGS),
    ]
    objects += [
        graph.compile(f"csrc/cpu/isa_{name}.cpp", *KERNEL_FLAGS, *defines, *flags)
        for name, flags in isas.items()
    ]
    return objects, ["baseline", *isas]


def cuda_problem() -> str:
    """Why there are no CUDA kernels."""
    return "this version has no CUDA kernels"


class BuildNative(build_ext):
    """Replaces the compilation of setuptools, which knows no flags per source."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = package / "metapool_kernels"
        package.mkdir(parents=True, exist_ok=True)
        facts: dict[str, dict[str, object]] = {"cuda": {"skipped": cuda_problem()}}
        parts = {
            "torch_ops": (torch_needs, "python_bindings/torch_ops.cpp", "_torch_ops.so"),
            "numpy_ops": (
                numpy_needs,
                "python_bindings/numpy_module.cpp",
                "_numpy_ops" + sysconfig.get_config_var("EXT_SUFFIX"),
            ),
        }
        try:
            compiler, ninja = find_compiler(), find_ninja()
        except CannotBuildError as problem:
            facts |= {part: {"skipped": str(problem)} for part in parts}
        else:
            self.build_parts(parts, package, compiler, ninja, facts)
        (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")
        for part, about in facts.items():
            print(f"metapool_kernels: {part}: {about.get('skipped', 'built')}", file=sys.stderr)

    def build_parts(self, parts, package, compiler, ninja, facts) -> None:
        """Build every part whose needs are met; a failing compiler is an error."""
        graph = Graph(compiler)
        kernels, isas = kernel_objects(graph)
        for part, (find_needs, source, library) in parts.items():
            try:
                needs = find_needs()
            except CannotBuildError as problem:
                facts[part] = {"skipped": str(problem)}
                continue
            objects = [graph.compile(source, *needs.compile_flags), *kernels]
            graph.link(objects, package / library, *needs.link_flags)
            facts[part] = {"compiler": compiler, "instruction_sets": isas, **needs.about}
        graph.run(ninja, Path(self.build_temp).resolve())

    def get_outputs(self) -> list[str]:
        """The files for the installer's record: all of them lie in the package already."""
        return []


# The extension is only named, so that setuptools calls build_ext and tags the wheel.
setup(
    ext_modules=[Extension("metapool_kernels._numpy_ops", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
