"""Builds the native parts: the torch ops (LibTorch stable ABI) and the NumPy module (pybind11).

The ops with CUDA kernels are a library of their own. They take minutes to compile, so that is done
where there is an NVIDIA GPU and nvcc, for the GPUs that are there, or where METAPOOL_BUILD_CUDA=1
asks for it, which takes neither a GPU nor a torch with CUDA.

Whatever cannot be built here is left out with a reason, which `python -m metapool_kernels.info`
shows; the package then runs on plain PyTorch. Everything else of the packaging is in
pyproject.toml.

Environment:
    CXX                   the C++ compiler. Default: the first of c++, g++, clang++.
    METAPOOL_BUILD_NATIVE 0 leaves all native parts out.
    METAPOOL_BUILD_CUDA   0 leaves the CUDA kernels out, 1 makes it an error to leave them out.
                          Default: they are built where there is a GPU for them.
    METAPOOL_CUDA_ARCHS   the GPUs to compile for. Default: those that are there; where none is, or
                          nvcc does not know one of them, "80;90;90+PTX".
    METAPOOL_ISAS         the instruction sets to compile for beside the baseline, which is always
                          there. Default: all of the machine's kind, as in "avx2;avx512".
    METAPOOL_CXXFLAGS     more flags for the C++ compiler and the linker, for instance for a
                          sanitizer; nvcc reads NVCC_APPEND_FLAGS.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

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
# The C++ compiler, which nvcc calls for what runs on the host, does not know its pragmas.
CUDA_FLAGS = ["-std=c++17", "-O3"]
CUDA_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"]
CUDA_ARCHS = "80;90;90+PTX"
OLDEST_CUDA_ARCH = 75  # dispatch.py refuses older GPUs
# What libraries show to the loader: Python's entry point, for torch's ops register themselves. The
# visibility of flags does not reach templates of the C++ library: shown, they could stand in for
# those of any other library, which may be built for another machine, and the other way round.
EXPORTS = "exports.map"
EXPORTED = "{ global: PyInit_*; local: *; };\n"


class CannotBuildError(Exception):
    """A part is left out; the message says what was missing."""


class SettingError(OptionError):
    """An environment variable asks for what cannot be; setuptools prints the message and stops."""


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


def find_nvcc() -> str:
    """Path of CUDA's compiler."""
    if os.environ.get("METAPOOL_BUILD_CUDA") == "0":
        raise CannotBuildError("METAPOOL_BUILD_CUDA=0 switched the build off")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [str(Path(home) / "bin") for home in (*homes, "/usr/local/cuda")]
    for path in (None, *folders):  # None is PATH
        if nvcc := shutil.which("nvcc", path=path):
            return nvcc
    raise CannotBuildError(f"nvcc was not found (looked on PATH and in {', '.join(folders)})")


def cuda_codes(archs: str) -> list[str]:
    """What nvcc compiles for METAPOOL_CUDA_ARCHS: "90" is sm_90, "90+PTX" compute_90 as well."""
    codes: list[str] = []
    for entry in re.split(r"[;,\s]+", archs.strip(";, \t\n")):
        match = re.fullmatch(r"(\d+)\.?(\d)(\+PTX)?", entry, re.IGNORECASE)
        if match is None:
            raise SettingError(
                f"METAPOOL_CUDA_ARCHS should be entries such as 80, 8.0 or 90+PTX with ; between "
                f"them, got {entry!r} in {archs!r}"
            )
        number = int(match[1] + match[2])
        if number < OLDEST_CUDA_ARCH:
            raise SettingError(
                f"METAPOOL_CUDA_ARCHS: the kernels need {OLDEST_CUDA_ARCH} or newer, got {entry!r}"
            )
        codes += [f"sm_{number}"] + [f"compute_{number}"] * (match[3] is not None)
    return list(dict.fromkeys(codes))


def gpu_archs() -> list[int]:
    """Compute capabilities of the NVIDIA GPUs that are here, as in [80, 90].

    Asked of the driver's own program: torch would have to start CUDA, and may be built without it.
    """
    question = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(question, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE)
    return sorted({int(major + minor) for major, minor in found})


def choose_codes(nvcc: str) -> list[str]:
    """What to compile for: what is named, else the GPUs that are here, else the default.

    A GPU that is newer than nvcc is served by the default, whose PTX its driver compiles.
    """
    here = [number for number in gpu_archs() if number >= OLDEST_CUDA_ARCH]
    if not here and os.environ.get("METAPOOL_BUILD_CUDA") != "1":
        raise CannotBuildError(
            f"nvidia-smi shows no GPU of compute capability {OLDEST_CUDA_ARCH} or newer; "
            "METAPOOL_BUILD_CUDA=1 compiles them all the same"
        )
    known = ask(nvcc, "--list-gpu-code").split()
    codes = [f"sm_{number}" for number in here]
    named = os.environ.get("METAPOOL_CUDA_ARCHS")
    if named or not codes or not set(codes) <= set(known):
        codes = cuda_codes(named or CUDA_ARCHS)
    unknown = [code for code in codes if code.replace("compute", "sm") not in known]
    if unknown:
        raise (SettingError if named else CannotBuildError)(
            f"{nvcc} does not know {', '.join(unknown)}; set METAPOOL_CUDA_ARCHS to some of what "
            f"`nvcc --list-gpu-code` shows: {' '.join(known)}"
        )
    return codes


def ask(nvcc: str, question: str) -> str:
    """What nvcc prints."""
    done = subprocess.run([nvcc, question], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotBuildError(f"{nvcc} {question} failed: {done.stderr.strip()}")
    return done.stdout


def check_works(nvcc: str) -> None:
    """Raise unless this nvcc can compile: it does so only beside some versions of C++ compilers."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text("#include <string>\n__global__ void kernel() {}\n")
        command = [nvcc, *CUDA_FLAGS, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CannotBuildError(f"{nvcc} cannot compile: {lines[0] if lines else 'it says nothing'}")


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
    """A ninja file: objects compiled once, linked into shared libraries."""

    def __init__(self, compiler: str) -> None:
        extra = shlex.split(os.environ.get("METAPOOL_CXXFLAGS", ""))
        self.lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
            "  description = compiling $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared {shlex.join([*extra, *exports('-Wl,')])} $in -o $out "
            "$libraries",
            "  description = linking $out",
        ]
        self.extra = extra

    def compile(self, source: str, *flags: str) -> str:
        """Add an object; returns its name."""
        output = source.replace("/", "_") + ".o"
        joined = shlex.join([*COMMON_FLAGS, *flags, *self.extra])
        self.lines += [f"build {output}: compile {escape(ROOT / source)}", f"  flags = {joined}"]
        return output

    def link(self, objects: list[str], output: Path, *flags: str, rule: str = "link") -> None:
        """Add a shared library."""
        self.lines += [
            f"build {escape(output)}: {rule} {' '.join(objects)}",
            f"  libraries = {shlex.join(flags)}",
        ]

    def use_nvcc(self, nvcc: str, codes: list[str]) -> None:
        """Add the rules ``cuda``, and ``link_cuda`` for a library that holds CUDA's runtime."""
        command = shlex.quote(nvcc)
        targets = [f"-gencode=arch={code.replace('sm', 'compute')},code={code}" for code in codes]
        # Of what goes through -Xcompiler nvcc takes commas for the end of a flag.
        extra = [f"-Xcompiler={flag}".replace(",", "\\,") for flag in self.extra]
        self.lines += [
            "rule cuda",
            f"  command = {command} -MMD -MF $out.d {shlex.join([*CUDA_FLAGS, *targets])} "
            "-c $in -o $out",
            "  description = compiling $out for GPUs",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link_cuda",
            f"  command = {command} -shared -cudart static "
            f"{shlex.join([*extra, *exports('-Xlinker=')])} $in -o $out $libraries",
            "  description = linking $out",
        ]

    def compile_cuda(self, source: str) -> str:
        """Add an object of kernels; returns its name."""
        output = source.replace("/", "_") + ".o"
        self.lines += [f"build {output}: cuda {escape(ROOT / source)}"]
        return output

    def write(self, folder: Path) -> None:
        """Write what ninja reads in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        (folder / EXPORTS).write_text(EXPORTED)

    def run(self, ninja: str, folder: Path) -> None:
        """Build everything in ``folder``."""
        self.write(folder)
        subprocess.run([ninja, "-C", str(folder)], check=True)


def exports(prefix: str) -> list[str]:
    """What tells the linker, by a flag with that prefix, to show the entry points alone."""
    return [f"{prefix}--version-script={EXPORTS}"] if sys.platform == "linux" else []


def escape(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def instruction_sets(wanted: str) -> dict[str, list[str]]:
    """Those of METAPOOL_ISAS beside the baseline, and the flags of each; all if none is named."""
    known = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {}
    names = [name for name in re.split(r"[;,\s]+", wanted) if name] or [*known]
    for name in names:
        if name not in ("baseline", *known):
            raise SettingError(
                f"METAPOOL_ISAS should be some of {['baseline', *known]} with ; between them, got "
                f"{name!r} in {wanted!r}"
            )
    return {name: flags for name, flags in known.items() if name in names}


def kernel_objects(graph: Graph) -> tuple[list[str], list[str]]:
    """Add the framework-free kernels; returns their objects and their instruction sets."""
    isas = instruction_sets(os.environ.get("METAPOOL_ISAS", ""))
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


def cuda_objects(graph: Graph, nvcc: str) -> tuple[list[str], dict[str, object]]:
    """Add the CUDA kernels; returns their objects and what to write down about them."""
    sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu"))
    codes = choose_codes(nvcc)
    check_works(nvcc)
    version = re.search(r"V(\d[\d.]*)", ask(nvcc, "--version"))
    graph.use_nvcc(nvcc, codes)
    about = {"nvcc": version[1] if version else "unknown", "compiler": nvcc, "architectures": codes}
    return [graph.compile_cuda(source) for source in sources], about


def without_cuda(problem: CannotBuildError) -> dict[str, object]:
    """What to write down where there are no CUDA kernels; an error if they were asked for."""
    if os.environ.get("METAPOOL_BUILD_CUDA") == "1":
        raise SettingError(f"METAPOOL_BUILD_CUDA=1, but {problem}") from problem
    return {"skipped": str(problem)}


def add_cuda(graph: Graph, library: Path) -> dict[str, object]:
    """Add the library of the CUDA kernels; returns what to write down about it."""
    try:
        nvcc, needs = find_nvcc(), torch_needs()
        objects, about = cuda_objects(graph, nvcc)
    except CannotBuildError as problem:
        return without_cuda(problem)
    objects += [graph.compile("python_bindings/torch_ops_cuda.cpp", *needs.compile_flags)]
    graph.link(objects, library, *needs.link_flags, rule="link_cuda")
    return about | needs.about


LIBRARIES = {
    "torch_ops": "_torch_ops.so",
    "numpy_ops": f"_numpy_ops{sysconfig.get_config_var('EXT_SUFFIX')}",
    "cuda": "_torch_ops_cuda.so",
}


class BuildNative(build_ext):
    """Replaces the compilation of setuptools, which knows no flags per source."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = package / "metapool_kernels"
        package.mkdir(parents=True, exist_ok=True)
        try:
            facts = self.build_parts(package, find_compiler(), find_ninja())
        except CannotBuildError as problem:
            facts = {part: {"skipped": str(problem)} for part in LIBRARIES}
            facts["cuda"] = without_cuda(problem)
        for part, about in facts.items():
            if "skipped" in about:  # what an earlier build left would be taken for this one's
                (package / LIBRARIES[part]).unlink(missing_ok=True)
        (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")
        for part, about in facts.items():
            print(f"metapool_kernels: {part}: {about.get('skipped', 'built')}", file=sys.stderr)

    def build_parts(self, package, compiler, ninja) -> dict[str, dict[str, object]]:
        """Build every part whose needs are met; a failing compiler is an error."""
        graph = Graph(compiler)
        kernels, isas = kernel_objects(graph)
        facts: dict[str, dict[str, object]] = {}
        parts = {
            "torch_ops": (torch_needs, "python_bindings/torch_ops.cpp"),
            "numpy_ops": (numpy_needs, "python_bindings/numpy_module.cpp"),
        }
        for part, (find_needs, source) in parts.items():
            try:
                needs = find_needs()
            except CannotBuildError as problem:
                facts[part] = {"skipped": str(problem)}
                continue
            objects = [graph.compile(source, *needs.compile_flags), *kernels]
            graph.link(objects, package / LIBRARIES[part], *needs.link_flags)
            facts[part] = {"compiler": compiler, "instruction_sets": isas, **needs.about}
        facts["cuda"] = add_cuda(graph, package / LIBRARIES["cuda"])
        # Not setuptools' own folder, which is a temporary one when an editable install is made:
        # what has been compiled once serves the wheel too, and a changed file is compiled alone.
        graph.run(ninja, ROOT / "build" / f"native-{sys.implementation.cache_tag}")
        return facts

    def get_outputs(self) -> list[str]:
        """The files for the installer's record: all of them lie in the package already."""
        return []


if __name__ == "__main__":
    # The extension is only named, so that setuptools calls build_ext and tags the wheel.
    setup(
        ext_modules=[Extension("metapool_kernels._numpy_ops", sources=[])],
        cmdclass={"build_ext": BuildNative},
    )
