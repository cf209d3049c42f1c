"""The compiled libraries: what they need of the system and of torch, and where AVX is used.

One binary is to load in every torch from 2.10 on and to run on every x86-64.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from metapool_kernels import native
from tests.backends import skip_or_fail
from tests.packaging import elf

pytestmark = pytest.mark.skipif(
    bool(elf.MISSING), reason=f"binutils are not installed: {', '.join(elf.MISSING)}"
)
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX belongs to x86-64 alone")

# C functions of torch's stable ABI; those for CUDA are missing in a torch that has none.
SHIM = r"(?!\w*_cuda_)(aoti_)?torch_\w+"
PYTHON = r"_?Py\w+"
# What the compiler asks for in any library, and nobody has to have.
TOOLCHAIN = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
TOOLCHAIN |= {"__cxa_finalize"}
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
SYSTEM |= {"ld-linux-aarch64.so.1"}

LIBRARIES = {
    "_torch_ops.so": (SHIM, {"libtorch_cpu.so"}, set()),
    "_torch_ops_cuda.so": (SHIM, {"libtorch_cpu.so"}, set()),
    "_numpy_ops*.so": (PYTHON, set(), {"PyInit__numpy_ops"}),
}
"""By pattern: imports that no version of a system library has, what else is loaded, exports."""

# The ratchet, of glibc 2.36 and GCC 12: RHEL 9, Ubuntu 22.04, Debian 12 and later have these.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (3, 0)}
BUILT_WITH = {"glibc": (2, 36), "GCC": 12}

VECTOR_SETS = {"VEX": ("avx2", "avx512"), "EVEX": ("avx512",)}
"""Namespaces of metapool::cpu that hold functions of either encoding."""


def _library(pattern: str) -> Path:
    found = sorted(Path(native.__file__).parent.glob(pattern))
    if not found and "cuda" in pattern:
        pytest.skip(str(native.CUDA_OPS_PROBLEM))
    if not found:
        skip_or_fail(f"{pattern} is not built")
    return found[0]


def foreign_imports(library: Path, allowed: str) -> list[str]:
    """Imports that are neither of a system library nor match ``allowed``."""
    names = [
        symbol.name
        for symbol in elf.symbols(library)
        if symbol.name
        and not symbol.is_defined
        and (symbol.version or "").partition("_")[0] not in NEWEST
        and symbol.name not in TOOLCHAIN
        and not re.fullmatch(allowed, symbol.name)
    ]
    return elf.demangled(names)


def exports(library: Path) -> set[str]:
    """What other libraries can bind to."""
    found = (symbol for symbol in elf.symbols(library) if symbol.is_defined)
    return {symbol.name for symbol in found if symbol.bind != "LOCAL"}


def needed_versions(library: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each system library's symbols."""
    newest: dict[str, tuple[int, ...]] = {}
    for symbol in elf.symbols(library):
        name, _, number = (symbol.version or "").partition("_")
        if name in NEWEST and not symbol.is_defined:
            version = tuple(int(part) for part in number.split("."))
            newest[name] = max(newest.get(name, ()), version)
    return newest


def misplaced(functions: dict[str, set[str]]) -> list[str]:
    """Functions that use AVX and may be called where there is none.

    The linker keeps one of all functions of a name. What is compiled with AVX must therefore bear
    the name of its set: a template of the C++ library would be called by all.
    """
    return [
        f"{function} ({encoding})"
        for function, encodings in functions.items()
        for encoding in sorted(encodings)
        if not any(f"metapool::cpu::{isa}::" in function for isa in VECTOR_SETS[encoding])
    ]


@pytest.mark.parametrize("pattern", LIBRARIES)
def test_imports(pattern: str) -> None:
    """C functions of torch and the system's libraries, nothing of torch's C++."""
    library = _library(pattern)
    allowed, also_needed, _ = LIBRARIES[pattern]
    assert foreign_imports(library, allowed) == []
    assert set(elf.dynamic(library, "NEEDED")) <= SYSTEM | also_needed


@pytest.mark.parametrize("pattern", ["_torch_ops.so", "_torch_ops_cuda.so"])
def test_imports_of_torch_are_declared(pattern: str) -> None:
    """In the headers of its stable ABI, which promise that they stay."""
    names = {s.name for s in elf.symbols(_library(pattern)) if re.fullmatch(SHIM, s.name)}
    assert "aoti_torch_library_init_impl" in names
    include = Path(torch.__file__).parent / "include/torch/csrc"
    headers = [include / "inductor/aoti_torch/c", include / "stable/c"]
    text = "\n".join(path.read_text() for folder in headers for path in folder.glob("*.h"))
    declared = set(re.findall(r"\w+", text))
    assert {name for name in names if name not in declared} == set()


@pytest.mark.parametrize("pattern", LIBRARIES)
def test_exports(pattern: str) -> None:
    """Python's entry point; the torch ops register themselves."""
    assert exports(_library(pattern)) == LIBRARIES[pattern][2]


@pytest.mark.parametrize("pattern", LIBRARIES)
def test_versions_of_system_libraries(pattern: str) -> None:
    library = _library(pattern)
    libc = tuple(int(part) for part in platform.libc_ver()[1].split(".") if part.isdigit())
    if libc > BUILT_WITH["glibc"]:
        pytest.skip(f"built with glibc {libc}: the versions are those of {BUILT_WITH['glibc']}")
    majors = [int(number) for number in re.findall(r"GCC: .* (\d+)\.", str(elf.compilers(library)))]
    if not majors or max(majors) > BUILT_WITH["GCC"]:
        pytest.skip(f"built with {elf.compilers(library)}: the versions are those of GCC 12")
    newer = {k: v for k, v in needed_versions(library).items() if v > NEWEST[k]}
    assert not newer, f"needs {newer}, more than {NEWEST}"


@pytest.mark.parametrize("pattern", LIBRARIES)
def test_what_the_loader_is_told(pattern: str) -> None:
    """No code on the stack, and no folder of the machine where it was built."""
    library = _library(pattern)
    assert elf.stack_flags(library) == "RW"
    for tag in ("RPATH", "RUNPATH", "TEXTREL"):
        assert elf.dynamic(library, tag) == []


@needs_x86
@pytest.mark.parametrize("pattern", LIBRARIES)
def test_avx_is_where_it_belongs(pattern: str) -> None:
    functions = elf.wide_functions(_library(pattern))
    assert misplaced(functions) == []
    isas = native.build_facts().get("torch_ops", {}).get("instruction_sets", [])[1:]
    of_cpu = "cuda" not in pattern
    for isa in isas:  # else nothing was looked at
        assert any(f"metapool::cpu::{isa}::" in name for name in functions) == of_cpu


SHARED = """
#include <cstdint>
// As a template of the C++ library: each object has it, the linker keeps one.
template <typename T> __attribute__((noinline)) T sum(const T* x, int n) {
  T total = 0;
  for (int i = 0; i < n; ++i) total += x[i] * x[i];
  return total;
}
"""
SOURCES = {
    "a.cpp": SHARED + "namespace metapool::cpu::avx2 { float go(const float* x) "
    "{ return x[3] * sum(x, 7); } }",
    "b.cpp": SHARED + "namespace metapool { float go(const float* x) { return x[2] * sum(x, 9); } }"
    "namespace at { int get_num_threads(); } int threads() { return at::get_num_threads(); }",
}


def _linked(folder: Path, *flags: str, order: tuple[str, ...] = ("b.cpp", "a.cpp")) -> Path:
    """A library of SOURCES, the first of them compiled with AVX2 where there is such a thing."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
        avx = ["-mavx2"] if name == "a.cpp" and platform.machine() == "x86_64" else []
        command = [compiler, "-O1", "-fPIC", *avx, "-c", name, "-o", f"{name}.o"]
        subprocess.run(command, cwd=folder, check=True)
    command = [compiler, "-shared", *flags, *(f"{name}.o" for name in order), "-o", "library.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "library.so"


@needs_x86
def test_a_shared_function_with_avx_is_noticed(tmp_path: Path) -> None:
    """Whether it is the one that is kept depends on the order of the objects."""
    assert misplaced(elf.wide_functions(_linked(tmp_path))) == []
    library = _linked(tmp_path, order=("a.cpp", "b.cpp"))
    (found,) = misplaced(elf.wide_functions(library))
    assert found == "float sum<float>(float const*, int) (VEX)"


def test_faults_of_linking_are_noticed(tmp_path: Path) -> None:
    library = _linked(tmp_path, "-Wl,-z,execstack,-rpath,/build/here")
    assert foreign_imports(library, SHIM) == ["at::get_num_threads()"]
    assert elf.stack_flags(library) == "RWE"
    assert elf.dynamic(library, "RPATH") + elf.dynamic(library, "RUNPATH") == ["/build/here"]
    assert "_Z7threadsv" in exports(library)


def test_encodings() -> None:
    """As objdump writes them."""
    lines = {
        " 1a0:\tc5 f8 58 c1          \tvaddps %xmm1,%xmm0,%xmm0": "VEX",
        " 1a4:\t64 c4 e2 7d 18 00    \tvbroadcastss %fs:(%rax),%ymm0": "VEX",
        " 1aa:\t62 f1 7c 48 58 c1    \tvaddps %zmm1,%zmm0,%zmm0": "EVEX",
        " 1b0:\t0f 58 c1             \taddps  %xmm1,%xmm0": None,
        " 1b3:\t66 0f 6f c1          \tmovdqa %xmm1,%xmm0": None,
        " 1b7:\tc5 f8 ": None,
    }
    assert {line: elf._encoding(line) for line in lines} == lines


def test_imports_of_cuda_are_noticed() -> None:
    """A torch for the CPU has no such functions, and would not load the library."""
    assert re.fullmatch(SHIM, "aoti_torch_device_type_cuda")
    assert not re.fullmatch(SHIM, "aoti_torch_get_current_cuda_stream")
    assert not re.fullmatch(SHIM, "cudaMalloc")
