"""The op and poolings side by side on NumPy arrays: the same C++ kernels, without torch tensors, on
the calling thread.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metapool_kernels.candidates import DEFAULT_CANDIDATES, parse_candidates
from metapool_kernels.checks import check_flag, check_skip_connect, check_stride
from metapool_kernels.layout import output_size
from metapool_kernels.native import numpy_ops

Array = NDArray[Any]


def isa_names() -> list[str]:
    """Instruction sets that were built in and that this machine has, slowest first."""
    names: list[str] = numpy_ops().isa_names()
    return names


def active_isa() -> str:
    """The instruction set in use: the last of :func:`isa_names`, or ``METAPOOL_ISA``."""
    name: str = numpy_ops().active_isa()
    return name


def meta_pool(
    x: Array,
    weights: Array,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    *,
    values: Array | None = None,
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
) -> Array:
    """``sum_k weights_k * P_k(values)``, every maximum being picked by ``x``.

    Args:
        x: (N, C, H, W), float16, float32 or float64, any strides.
        weights: (K,), (C, K), (N, 1, K) or (N, C, K): the weights themselves, no softmax.
        candidates: names of the K poolings, see :func:`metapool_kernels.fused_meta_pool`.
        values: map of the shape and dtype of ``x``. Default: ``x`` itself.
        stride: rows and columns between windows, in pixels. Default: 1.
        count_include_pad: whether the divisor of an average counts the padding.

    Returns:
        (N, C, H_out, W_out) in the dtype of ``x``, C-contiguous.

    Raises:
        TypeError: not an array, or of another dtype.
        ValueError: a shape, candidate or stride that is not allowed.
        RuntimeError: the NumPy module was not built.
    """
    spec = _spec(candidates, stride, count_include_pad)
    arrays = _prepare(x, weights, values, len(spec[0]))
    out: Array = numpy_ops().meta_pool_fwd(*arrays, *spec)
    return out


def meta_pool_grad(
    grad_out: Array,
    x: Array,
    weights: Array,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    *,
    values: Array | None = None,
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
) -> tuple[Array, Array]:
    """Gradients of ``sum(grad_out * meta_pool(x, weights, ...))``.

    Args:
        grad_out: (N, C, H_out, W_out) in the dtype of ``x``.
        x, weights, candidates, values, stride, count_include_pad: as for :func:`meta_pool`.

    Returns:
        The gradient of ``values`` (of ``x`` where there are none) in its shape and dtype, and
        that of ``weights`` in its shape, in float32 (float64 for float64 ``x``).

    Raises:
        The same as :func:`meta_pool`.
    """
    spec = _spec(candidates, stride, count_include_pad)
    arrays = _prepare(x, weights, values, len(spec[0]))
    grad_out = _as_map("grad_out", grad_out)
    n, c, h, w = arrays[0].shape
    _check_like("grad_out", grad_out, (n, c, *output_size((h, w), spec[1:3])), arrays[0])
    grads: tuple[Array, Array] = numpy_ops().meta_pool_bwd(grad_out, *arrays, *spec)
    return grads[0], grads[1].reshape(weights.shape)


def multi_pool(
    x: Array,
    candidates: Sequence[str],
    *,
    values: Array | None = None,
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
) -> Array:
    """All ``P_k(values)`` side by side, every maximum being picked by ``x``.

    Args:
        x, candidates, values, stride, count_include_pad: as for :func:`meta_pool`.

    Returns:
        (N, K * C, H_out, W_out), all channels of a candidate together, in the dtype of ``x``,
        C-contiguous.

    Raises:
        The same as :func:`meta_pool`.
    """
    spec = _spec(candidates, stride, count_include_pad)
    x, values = _prepare_maps(x, values)
    out: Array = numpy_ops().meta_pool_fwd(x, None, values, *spec)
    return out


def multi_pool_grad(
    grad_out: Array,
    x: Array,
    candidates: Sequence[str],
    *,
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
) -> Array:
    """Gradient of ``sum(grad_out * multi_pool(x, ...))`` in the shape and dtype of ``x``.

    Args:
        grad_out: (N, K * C, H_out, W_out) in the dtype of ``x``.
        x, candidates, stride, count_include_pad: as for :func:`multi_pool`.

    Raises:
        The same as :func:`meta_pool`.
    """
    spec = _spec(candidates, stride, count_include_pad)
    x, values = _prepare_maps(x, None)
    grad_out = _as_map("grad_out", grad_out)
    n, c, h, w = x.shape
    size = (n, len(spec[0]) * c, *output_size((h, w), spec[1:3]))
    _check_like("grad_out", grad_out, size, x)
    grad_x: Array = numpy_ops().meta_pool_bwd(grad_out, x, None, values, *spec)[0]
    return grad_x


def _prepare_maps(x: Array, values: Array | None) -> tuple[Array, Array]:
    x = _as_map("x", x)
    if 0 in x.shape[1:]:
        raise ValueError(f"x should have non-zero channels, height and width, got shape {x.shape}")
    if values is None:
        return x, x
    values = _as_map("values", values)
    _check_like("values", values, x.shape, x)
    return x, values


def _prepare(
    x: Array, weights: Array, values: Array | None, num_candidates: int
) -> tuple[Array, Array, Array]:
    x, values = _prepare_maps(x, values)
    if not _is_plain(weights) or weights.dtype.kind != "f":
        raise TypeError(f"weights should be a NumPy array of floats, got {_type_of(weights)}")
    n, c = x.shape[:2]
    if weights.ndim == 0 or weights.shape[:-1] not in ((), (c,), (n, 1), (n, c)):
        raise ValueError(
            "weights should have shape (K,), (C, K), (N, 1, K) or (N, C, K) "
            f"for x of shape {x.shape}, got {weights.shape}"
        )
    if weights.shape[-1] != num_candidates:
        raise ValueError(
            f"weights should contain {num_candidates} elements not {weights.shape[-1]}, one for "
            f"each candidate on its last axis; got shape {weights.shape}"
        )
    accumulate = np.float64 if x.dtype == np.float64 else np.float32
    wide = weights.astype(accumulate).reshape((1,) * (3 - weights.ndim) + weights.shape)
    return x, wide, values


def _check_like(name: str, array: Array, shape: tuple[int, ...], x: Array) -> None:
    if array.shape != shape:
        raise ValueError(
            f"{name} should have shape {shape} for x of shape {x.shape}, got {array.shape}"
        )
    if array.dtype != x.dtype:
        raise TypeError(f"{name} should have dtype {x.dtype} as x, got {array.dtype}")


def _is_plain(value: object) -> bool:
    """Whether memory holds what the array says: a mask would be passed over."""
    return isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)


def _as_map(name: str, array: Array) -> Array:
    if not _is_plain(array) or array.dtype.kind != "f" or array.itemsize > 8:
        raise TypeError(
            f"{name} should be a NumPy array of float16, float32 or float64, got {_type_of(array)}"
        )
    if array.ndim != 4:
        raise ValueError(f"{name} should be 4-D (N, C, H, W), got shape {array.shape}")
    # The kernels count strides in whole elements of native byte order.
    whole = all(stride % array.itemsize == 0 for stride in array.strides)
    aligned = array.dtype.isnative and array.flags.aligned and whole
    return array if aligned else np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _type_of(value: object) -> str:
    return str(value.dtype) if type(value) is np.ndarray else type(value).__name__


def _spec(
    candidates: Sequence[str], stride: int | tuple[int, int], count_include_pad: bool
) -> tuple[list[int], int, int, bool]:
    parsed = parse_candidates(candidates)
    check_flag("count_include_pad", count_include_pad)
    steps = check_stride(stride)
    check_skip_connect(parsed, steps)
    return [c.code for c in parsed], *steps, count_include_pad
