"""The op in all its forms on NumPy arrays: the same C++ kernels, without torch tensors, on the
calling thread.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metapool_kernels.candidates import (
    DEFAULT_CANDIDATES,
    normalized_positions,
    parse_candidates,
)
from metapool_kernels.checks import check_flag, check_norm, check_skip_connect, check_stride
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
    out: Array = numpy_ops().meta_pool_fwd(*arrays, None, *spec)
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
    out: Array = numpy_ops().meta_pool_fwd(x, None, values, None, *spec)
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


class NormalizedPool(NamedTuple):
    """What :func:`normalized_meta_pool` returns."""

    out: Array
    """(N, C, H_out, W_out) in the dtype of ``x``, C-contiguous."""
    mean: Array
    """(K, C), float64: that each pooling was normalised by; 0 for ``skip_connect`` and ``none``."""
    variance: Array
    """(K, C), float64: the biased variance, likewise; 1 for these."""


def normalized_meta_pool(
    x: Array,
    weights: Array,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    *,
    statistics: tuple[Array, Array] | None = None,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
) -> NormalizedPool:
    """``sum_k weights_k * (P_k(x) - mean_k) / sqrt(variance_k + eps)``.

    ``skip_connect`` and ``none`` are not normalised, see
    :func:`metapool_kernels.fused_normalized_meta_pool`.

    Args:
        x, weights, candidates, stride, count_include_pad: as for :func:`meta_pool`.
        statistics: mean and variance of each candidate and channel, (K, C) each. Default: those of
            the poolings of ``x``.
        eps: added to variances, above 0.

    Returns:
        The mixture, and the statistics that it was normalised by.

    Raises:
        The same as :func:`meta_pool`; also a ValueError for one value per channel without
        ``statistics``.
    """
    spec = _spec(candidates, stride, count_include_pad)
    x, weights, _ = _prepare(x, weights, None, len(spec[0]))
    norm = _norm(x, candidates, statistics, eps, spec)
    scaled, constants = norm.mixture(weights)
    out: Array = numpy_ops().meta_pool_fwd(x, scaled, x, constants, *spec)
    return NormalizedPool(out, norm.mean.T, norm.variance.T)


def normalized_meta_pool_grad(
    grad_out: Array,
    x: Array,
    weights: Array,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    *,
    statistics: tuple[Array, Array] | None = None,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
) -> tuple[Array, Array]:
    """Gradients of ``sum(grad_out * normalized_meta_pool(x, weights, ...).out)``.

    Args:
        grad_out: (N, C, H_out, W_out) in the dtype of ``x``.
        x, weights, candidates, statistics, eps, stride, count_include_pad: as for
            :func:`normalized_meta_pool`. Without ``statistics`` the gradient of ``x`` takes in that
            they follow it.

    Returns:
        The gradient of ``x`` and that of ``weights``, as :func:`meta_pool_grad`.

    Raises:
        The same as :func:`normalized_meta_pool`.
    """
    spec = _spec(candidates, stride, count_include_pad)
    shape = weights.shape if _is_plain(weights) else ()
    x, weights, _ = _prepare(x, weights, None, len(spec[0]))
    grad_out = _as_map("grad_out", grad_out)
    n, c, h, w = x.shape
    rows, columns = output_size((h, w), spec[1:3])
    _check_like("grad_out", grad_out, (n, c, rows, columns), x)
    norm = _norm(x, candidates, statistics, eps, spec)
    ops, (scaled, _) = numpy_ops(), norm.mixture(weights)
    shifts = norm.mean.astype(weights.dtype)[None]
    totals, products = np.moveaxis(ops.meta_pool_moments(x, grad_out, shifts, *spec), -1, 0)
    products = norm.scale * (products - (norm.mean - shifts) * totals)  # <g, n_k>
    summed = tuple(axis for axis in (0, 1) if weights.shape[axis] == 1)
    grad_weights = products.sum(summed).astype(weights.dtype).reshape(shape)
    if statistics is not None:
        return ops.meta_pool_bwd(grad_out, x, scaled, x, *spec)[0], grad_weights
    # Means, over N, H and W, of what each candidate is sent and of its products with n_k.
    share = norm.is_normalized / max(n * rows * columns, 1)
    sent, along = share * (weights * totals).sum(0), share * (weights * products).sum(0)
    slopes = -np.square(norm.scale) * along
    offsets = -norm.scale * sent - slopes * (norm.mean - shifts[0])
    terms = [scaled, *(term.astype(weights.dtype)[None] for term in (offsets, slopes)), shifts]
    return ops.meta_pool_affine_bwd(grad_out, x, terms, *spec), grad_weights


class _Norm(NamedTuple):
    """What poolings are normalised by, (C, K) each."""

    mean: Array
    variance: Array
    scale: Array
    is_normalized: Array
    """(K,), ones and zeros."""

    def mixture(self, weights: Array) -> tuple[Array, Array]:
        """The weights and the constants of the mixture that this is."""
        scaled = (weights * self.scale).astype(weights.dtype)
        # Taken from the weights as they are rounded, so that a large mean cancels.
        constants = -(scaled * self.mean).sum(-1, keepdims=True)
        return scaled, constants.astype(weights.dtype)


def _norm(
    x: Array,
    candidates: Sequence[str],
    statistics: tuple[Array, Array] | None,
    eps: float,
    spec: tuple[list[int], int, int, bool],
) -> _Norm:
    check_norm(0.0, eps)
    count, positions = len(spec[0]), normalized_positions(parse_candidates(candidates))
    is_normalized = np.zeros(count)
    is_normalized[positions] = 1
    mean = np.zeros((x.shape[1], count))
    variance, scale = np.ones_like(mean), np.ones_like(mean)
    if statistics is not None:
        given = [_as_statistics(array, x, count) for array in statistics]
        mean[:, positions], variance[:, positions] = (array[:, positions] for array in given)
    elif positions:
        codes = [spec[0][k] for k in positions]
        mean[:, positions], variance[:, positions] = _statistics(x, (codes, *spec[1:]))
    scale[:, positions] = 1 / np.sqrt(variance[:, positions] + eps)
    return _Norm(mean, variance, scale, is_normalized)


def _statistics(x: Array, spec: tuple[list[int], int, int, bool]) -> tuple[Array, Array]:
    """Mean and biased variance of each pooling of ``x``, (C, K)."""
    rows, columns = output_size((x.shape[2], x.shape[3]), spec[1:3])
    size = x.shape[0] * rows * columns
    if size == 1:
        raise ValueError(
            f"normalising takes more than one value per channel, got x of shape {x.shape}"
        )
    if size == 0:
        nothing = np.zeros((x.shape[1], len(spec[0])))
        return nothing, nothing
    planes = numpy_ops().meta_pool_moments(x, None, None, *spec)
    if x.dtype != np.float64 and np.isinf(planes[..., 1]).any():  # squares that float32 cannot hold
        planes = numpy_ops().meta_pool_moments(x.astype(np.float64), None, None, *spec)
    means, deviations = planes[..., 0], planes[..., 1]
    return means.mean(0), deviations.sum(0) / size + means.var(0)


def _as_statistics(array: Array, x: Array, count: int) -> Array:
    """Such statistics of one kind, (C, K)."""
    if not _is_plain(array) or array.dtype.kind != "f":
        raise TypeError(f"statistics should be NumPy arrays of floats, got {_type_of(array)}")
    if array.shape != (count, x.shape[1]):
        raise ValueError(
            f"statistics should have shape {(count, x.shape[1])}, (K, C), for x of shape "
            f"{x.shape}, got {array.shape}"
        )
    return array.astype(np.float64).T


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
