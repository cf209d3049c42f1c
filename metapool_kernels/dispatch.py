"""Which backend runs a call, or why not.

Each backend has one predicate: it returns None where it can run the call, else the reason why
not and the way to get it. The automatic choice and the forced one ask the same predicate.
"""

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from metapool_kernels import native

_OLDEST_TRITON = (3, 6)
_OLDEST_CAPABILITY = {"triton": (8, 0), "cuda": (7, 5)}
_TRITON_NAMES = ("triton", "triton-rocm", "pytorch-triton-rocm")
"""Under one of these Triton is installed; torch for AMD's GPUs brings its own."""


def _triton_version() -> str | None:
    """The version that is installed, or None."""
    for name in _TRITON_NAMES:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


@cache
def _triton_problem() -> str | None:
    """Why the Triton kernels cannot be imported here; asks without importing anything."""
    version = _triton_version()
    if importlib.util.find_spec("triton") is None or version is None:
        return "Triton is not installed; get it with `pip install triton`"
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_TRITON:
        return f"Triton {version} is too old; get 3.6 or newer with `pip install -U triton`"
    return None


def _gpu_problem(backend: str, device: torch.device) -> str | None:
    """Why a GPU cannot run a backend's kernels."""
    return _find_gpu_problem(backend, device)


# What it asks for cannot be traced. This is all that torch.compiler.assume_constant_result does,
# which would import the compiler.
_gpu_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _find_gpu_problem(backend: str, device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return _amd_problem(backend)
    capability = torch.cuda.get_device_capability(device)
    oldest = _OLDEST_CAPABILITY[backend]
    if capability < oldest:
        return f"{device} has compute capability {capability}, {oldest} is needed"
    return _architecture_problem(device, capability) if backend == "cuda" else None


def _amd_problem(backend: str) -> str | None:
    """Why AMD's GPUs run none of a backend's kernels."""
    if backend == "cuda":
        return "the kernels in CUDA are for NVIDIA GPUs"
    if _tries_amd():
        return None
    return (
        "the kernels compile for AMD's GPUs, but nobody has run them there yet; set "
        "METAPOOL_ROCM=1 before the first call to try them, and compare with backend='reference'"
    )


def _tries_amd() -> bool:
    """Whether AMD's GPUs are to run what has only been compiled for them."""
    return os.environ.get("METAPOOL_ROCM") == "1"


def _architecture_problem(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why a GPU runs none of the code that setup.py compiled."""
    built: list[str] | None = native.build_facts().get("cuda", {}).get("architectures")
    if built is None or any(_covers(name, capability) for name in built):
        return None
    number = "".join(map(str, capability))
    return (
        f"the CUDA kernels were compiled for {', '.join(built)} and {device} is sm_{number}; "
        f"set METAPOOL_CUDA_ARCHS={number} and run `pip install .` again"
    )


def _covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs machine code as ``sm_90`` or can compile code as ``compute_90``."""
    kind, number = architecture.split("_")
    compiled_for = divmod(int(number), 10)
    same_family = kind == "compute" or compiled_for[0] == capability[0]
    return same_family and compiled_for <= capability


def _refuse_triton(x: Tensor) -> str | None:
    device = x.device.type
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "it takes tensors on a GPU and x is on cpu; move x with x.cuda(), or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    if device not in ("cpu", "cuda", "meta"):
        return f"it takes tensors on a GPU and x is on {x.device}; move x with x.cuda()"
    problem = _triton_problem()
    if problem is None and device == "cuda":
        problem = _gpu_problem("triton", x.device)
    return problem


def _refuse_cuda(x: Tensor) -> str | None:
    device = x.device.type
    if device not in ("cuda", "meta"):
        return f"it takes tensors on a GPU and x is on {x.device}; move x with x.cuda()"
    if device == "meta":
        return None  # shapes of meta tensors need no compiled kernel
    if native.CUDA_OPS_PROBLEM is not None:
        return native.CUDA_OPS_PROBLEM
    return _gpu_problem("cuda", x.device)


def _refuse_cpu(x: Tensor) -> str | None:
    device = x.device.type
    if device not in ("cpu", "meta"):
        return f"it takes CPU tensors and x is on {x.device}; move x with x.cpu()"
    if device == "meta" or native.TORCH_OPS_PROBLEM is None:
        return None  # shapes of meta tensors need no compiled kernel
    return native.TORCH_OPS_PROBLEM


def _refuse_reference(x: Tensor) -> str | None:
    return None


BACKENDS: dict[str, Callable[[Tensor], str | None]] = {
    "triton": _refuse_triton,
    "cuda": _refuse_cuda,
    "cpu": _refuse_cpu,
    "reference": _refuse_reference,
}
"""The predicates by name."""

_AUTOMATIC = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
"""What ``backend=None`` asks for tensors on a device, in this order."""

_NOT_THE_USER = ("metapool_kernels", "torch")
"""Packages whose frames a warning passes over."""


def _tell_of_fallback(x: Tensor) -> None:
    """Warn, once in a process, that a call runs without the kernels that there are for its device.

    Tensors without data say nothing of where a call will run.
    """
    device = x.device.type
    if device not in _AUTOMATIC:
        return
    if not torch.compiler.is_dynamo_compiling() and is_fake(x):  # to Dynamo none looks fake
        return
    kernels = [name for name in _AUTOMATIC[device] if name != "reference"]
    _warn_once(device, " ".join([f"{name}: {BACKENDS[name](x)}." for name in kernels]))


_has_warned = False


def _warn_once(device: str, reasons: str) -> None:
    global _has_warned
    if _has_warned or (device == "cuda" and torch.version.hip is not None and not _tries_amd()):
        return  # on AMD's GPUs nobody misses kernels that nobody has run there
    _has_warned = True
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USER:
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"fused_meta_pool runs in plain PyTorch on {device}, many times slower than its kernels. "
        f"{reasons} `python -m metapool_kernels.info` shows what is there; backend='reference' "
        "asks for plain PyTorch and does not warn.",
        RuntimeWarning,
        stacklevel=level,
    )


# While a graph is traced it is called, and leaves nothing in the graph: as _gpu_problem.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_backend(backend: object) -> None:
    """Raise ValueError unless ``backend`` is None or the name of one, available or not."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"backend should be None or one of {list(BACKENDS)}, got {backend!r}")


def choose_backend(backend: str | None, x: Tensor) -> str:
    """Name of the backend that runs a call on ``x``.

    Args:
        backend: a name that is forced, or None for the first backend that can.
        x: the input of the call, on its device.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the forced backend cannot run here; says why and how to get it.
    """
    if backend is None:
        for name in _AUTOMATIC.get(x.device.type, _AUTOMATIC["cpu"]):
            if BACKENDS[name](x) is None:
                if name == "reference":
                    _tell_of_fallback(x)
                return name
        raise RuntimeError(f"no backend can run a call on {x.device}")
    check_backend(backend)
    reason = BACKENDS[backend](x)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    return backend
