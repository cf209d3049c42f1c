"""Which backend runs a call, or why not.

Each backend has one predicate: it returns None where it can run the call, else the reason why
not and the way to get it. The automatic choice and the forced one ask the same predicate.
"""

from collections.abc import Callable

from torch import Tensor

from metapool_kernels import native


def _refuse_triton(x: Tensor) -> str | None:
    return "this version has no Triton kernels; use backend='cpu' or 'reference'"


def _refuse_cuda(x: Tensor) -> str | None:
    return "this version has no CUDA kernels; use backend='cpu' or 'reference'"


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
"""The predicates by name, in the order in which ``backend=None`` asks them."""


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
        for name, refuse in BACKENDS.items():
            if refuse(x) is None:
                return name
        raise RuntimeError(f"no backend can run a call on {x.device}")
    check_backend(backend)
    reason = BACKENDS[backend](x)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    return backend
