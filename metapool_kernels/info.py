"""``python -m metapool_kernels.info``: versions, what was built, what is usable, and why not."""

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator

import torch

from metapool_kernels import native
from metapool_kernels.dispatch import BACKENDS
from metapool_kernels.version import __version__


def _versions() -> Iterator[tuple[str, str]]:
    yield "metapool_kernels", __version__
    yield "python", f"{platform.python_version()} on {platform.machine()}"
    for package in ("torch", "triton", "numpy"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    if torch.cuda.is_available():
        yield "gpu", torch.cuda.get_device_name()
    else:
        yield "gpu", f"none is usable: {_no_gpu()}"
    yield "nvcc", shutil.which("nvcc") or "not found"


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return "torch found no GPU or no driver"


def _built() -> Iterator[tuple[str, str]]:
    facts = native.build_facts()
    if not facts:
        yield "native parts", "never built; run `pip install .` where a C++17 compiler is found"
    for part, about in facts.items():
        if "skipped" in about:
            yield part, f"not built: {about['skipped']}"
        else:
            yield part, ", ".join(f"{name} {_words(value)}" for name, value in about.items())


def _words(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _usable() -> Iterator[tuple[str, str]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty(1, 1, 1, 1, device=device)
    for name, refuse in BACKENDS.items():
        reason = refuse(x)
        if reason is not None and device == "cpu" and name in ("triton", "cuda"):
            reason = f"no GPU is usable; {reason}"
        yield name, f"usable on {device}" if reason is None else f"not usable on {device}: {reason}"
    try:
        ops = native.numpy_ops()  # not numpy_api, which needs NumPy itself
        yield "instruction set", f"{ops.active_isa()} of {_words(ops.isa_names())}"
    except (RuntimeError, ValueError) as problem:
        yield "instruction set", f"unknown: {problem}"


def report() -> str:
    """The whole report, one fact a line."""
    sections = {"versions": _versions(), "built": _built(), "backends": _usable()}
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:<18}{text}" for name, text in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
