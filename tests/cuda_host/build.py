"""The CUDA kernels compiled for the CPU: `python -m tests.cuda_host.build [--sanitize]`.

The library has the ops of `python_bindings/torch_ops_cuda.cpp`, on tensors in the CPU's memory.
"""

import argparse
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests import setup_script

HEADER = Path(__file__).parent / "cuda_host.h"
LIBRARY = "_torch_ops_cuda_host.so"

FLAGS = [
    *["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"],
    *["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-fmax-errors=5"],
    # Kernels read maps of any type as vectors of words, which CUDA allows.
    "-fno-strict-aliasing",
    "-fno-extern-tls-init",
]
# As in the Makefile, for the same reasons.
SANITIZERS = [
    *["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "-fno-sanitize=null,object-size,vptr,pointer-overflow",
    *["--param", "asan-instrumentation-with-call-threshold=0", "-fno-omit-frame-pointer", "-O1"],
]
KERNEL_FLAGS = ["-DMETAPOOL_CUDA_HOST", "-x", "c++", "-include", str(HEADER)]


_SETUP = setup_script.load()
CannotBuildError = _SETUP.CannotBuildError
escape = _SETUP.escape


def find_compiler() -> str:
    """Path of g++, the one compiler that the header is written for."""
    if path := shutil.which("g++"):
        return path
    raise CannotBuildError("g++ was not found")


def ninja_file(
    sources_root: Path, library: Path, *, sanitize: bool, flags: Sequence[str] = ()
) -> str:
    """What is compiled and linked, and how; ``flags`` come last."""
    torch = _SETUP.torch_needs()
    shared = [*FLAGS, *(SANITIZERS if sanitize else []), *flags]
    sources = dict.fromkeys(sorted(sources_root.glob("csrc/cuda/*.cu")), KERNEL_FLAGS)
    binding = sources_root / "python_bindings/torch_ops_cuda.cpp"
    sources[binding] = ["-DMETAPOOL_CUDA_HOST", *torch.compile_flags]
    # What is missing is better told now than where it is loaded; sanitizers come with the program.
    whole = [] if sanitize else ["-Wl,-z,defs"]
    libraries = shlex.join([*whole, *torch.link_flags])
    lines = [
        "rule compile",
        f"  command = {find_compiler()} -MMD -MF $out.d {shlex.join(shared)} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {find_compiler()} -shared {shlex.join(shared)} $in -o $out {libraries}",
    ]
    for source, own in sources.items():
        lines += [
            f"build {source.name}.o: compile {escape(source)}",
            f"  flags = {shlex.join(own)}",
        ]
    objects = " ".join(f"{source.name}.o" for source in sources)
    return "\n".join([*lines, f"build {escape(library)}: link {objects}", ""])


def build(
    sources_root: Path, folder: Path, *, sanitize: bool = False, flags: Sequence[str] = ()
) -> Path:
    """Compile what has changed under ``sources_root``; returns the library's path."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    text = ninja_file(sources_root.resolve(), library, sanitize=sanitize, flags=flags)
    (folder / "build.ninja").write_text(text)
    command = [_SETUP.find_ninja(), "-C", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not compile for the CPU:\n{done.stdout}")
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels for the CPU.")
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    sanitize = parser.parse_args().sanitize
    root = Path(__file__).parents[2]
    folder = root / "build" / ("cuda_host_sanitized" if sanitize else "cuda_host")
    try:
        print(build(root, folder, sanitize=sanitize))
    except (CannotBuildError, RuntimeError) as problem:
        raise SystemExit(str(problem)) from None


if __name__ == "__main__":
    main()
