"""The op once more, in NumPy alone: a witness that shares no line with PyTorch or the kernels.

Every window is cut out of a padded map and looked at by itself, in float64.
"""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from metapool_kernels.candidates import Candidate, Kind, parse_candidates
from tests.cases import Case

Array = NDArray[Any]


def forward_and_gradients(
    x: Array, weights: Array, grad_out: Array, case: Case
) -> tuple[Array, Array, Array]:
    """The output and the gradients of ``x`` and of the (N, C, K) weights, all float64."""
    x, grad_out = x.astype(np.float64), grad_out.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities that meet, as they may
        return _forward_and_gradients(x, weights, grad_out, case)


def _forward_and_gradients(
    x: Array, weights: Array, grad_out: Array, case: Case
) -> tuple[Array, Array, Array]:
    stride = case.stride if isinstance(case.stride, tuple) else (case.stride, case.stride)
    out, grad_x, grad_weights = np.zeros(grad_out.shape), np.zeros(x.shape), np.zeros(weights.shape)
    for k, candidate in enumerate(parse_candidates(case.candidates)):
        pooled, shares = _pool(x, candidate, stride, case.count_include_pad)
        if case.form == "stack":
            channels = slice(k * x.shape[1], (k + 1) * x.shape[1])
            out[:, channels] = pooled
            spread = grad_out[:, channels]
        else:
            weight = weights[:, :, k, None, None]
            out = out + weight * pooled
            grad_weights[:, :, k] = (pooled * grad_out).sum((2, 3))
            spread = weight * grad_out
        if candidate.kind is not Kind.NONE:
            grad_x += _spread(shares, spread, x.shape, candidate, stride)
    return out, grad_x, grad_weights


def _pool(
    x: Array, candidate: Candidate, stride: tuple[int, int], count_include_pad: bool
) -> tuple[Array, Array]:
    """One pooling, and what each pixel of a window has of its value: (N, C, H', W', kh, kw)."""
    kh, kw = (1, 1) if candidate.kind in (Kind.SKIP, Kind.NONE) else (candidate.kh, candidate.kw)
    around = ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2))
    is_max = candidate.kind is Kind.MAX
    padded = np.pad(x, around, constant_values=-np.inf if is_max else 0.0)
    inside = np.pad(np.ones(x.shape, bool), around)
    steps = (
        ...,
        slice(None, None, stride[0]),
        slice(None, None, stride[1]),
        slice(None),
        slice(None),
    )
    windows, valid = (sliding_window_view(a, (kh, kw), (2, 3))[steps] for a in (padded, inside))
    if is_max:
        place = _places(windows, valid)
        shares = np.arange(kh * kw) == place[..., None]
        pooled = np.take_along_axis(windows.reshape(shares.shape), place[..., None], -1)[..., 0]
        return pooled, shares.reshape(windows.shape).astype(np.float64)
    if candidate.kind is Kind.NONE:
        return np.zeros(windows.shape[:4]), np.zeros(windows.shape)
    count = np.full(valid.shape[:4], kh * kw) if count_include_pad else valid.sum((4, 5))
    return windows.sum((4, 5)) / count, valid / count[..., None, None]


def _places(windows: Array, valid: Array) -> Array:
    """Of each window the first maximum in reading order, or the last NaN where there is one."""
    flat = windows.reshape(*windows.shape[:4], windows.shape[4] * windows.shape[5])
    on_map = valid.reshape(flat.shape)
    is_nan = np.isnan(flat)
    last_nan = flat.shape[-1] - 1 - is_nan[..., ::-1].argmax(-1)
    highest = np.where(is_nan, -np.inf, flat).max(-1, keepdims=True)
    first = ((flat == highest) & on_map).argmax(-1)  # not in the padding, where all is -Inf
    return np.where(is_nan.any(-1), last_nan, first)


def _spread(
    shares: Array,
    grads: Array,
    size: tuple[int, ...],
    candidate: Candidate,
    stride: tuple[int, int],
) -> Array:
    """Give every window's gradient to its pixels, one place in the window after the other."""
    kh, kw = shares.shape[4:]
    rows, columns = size[2] + kh - 1, size[3] + kw - 1
    around = np.zeros((*size[:2], rows, columns))
    for i in range(kh):
        for j in range(kw):
            there = around[:, :, i : i + size[2] : stride[0], j : j + size[3] : stride[1]]
            there += np.where(shares[..., i, j] == 0, 0.0, shares[..., i, j] * grads)
    return around[:, :, kh // 2 : kh // 2 + size[2], kw // 2 : kw // 2 + size[3]]
