"""Checks of the arguments: every error message of the op is written here.

All of them run before anything is computed, so an error leaves the inputs untouched.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from metapool_kernels.candidates import Candidate, Kind

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_STRIDE = 2**31 - 1
NORMALIZATIONS = ("softmax", None)


def check_stride(stride: int | Sequence[int]) -> tuple[int, int]:
    """Return the stride as (rows, columns), in pixels.

    Raises:
        TypeError: not an int or a pair of ints.
        ValueError: not positive, too large, or not a pair.
    """
    if type(stride) is int and 0 < stride <= MAX_STRIDE:  # the usual case, on the way of every call
        return stride, stride
    given: tuple[Any, ...] = tuple(stride) if isinstance(stride, (tuple, list)) else (stride,) * 2
    # A tracer turns ints into symbols; of these it makes constants.
    pair = tuple(int(step) if isinstance(step, torch.SymInt) else step for step in given)
    if not all(isinstance(step, int) and not isinstance(step, bool) for step in pair):
        raise TypeError(f"stride should be an int or a pair of ints, got {stride!r}")
    if len(pair) != 2 or min(pair) < 1 or max(pair) > MAX_STRIDE:
        raise ValueError(f"stride should be one or two ints from 1 to {MAX_STRIDE}, got {stride!r}")
    return pair[0], pair[1]


def check_skip_connect(candidates: Sequence[Candidate], stride: tuple[int, int]) -> None:
    """Raise ValueError where ``skip_connect`` meets a stride above 1."""
    if max(stride) > 1 and any(candidate.kind is Kind.SKIP for candidate in candidates):
        got = stride[0] if stride[0] == stride[1] else stride
        raise ValueError(
            f"skip_connect keeps the size of x and needs stride 1, got stride {got}; "
            "leave it out of candidates or use stride 1"
        )


def check_normalize(normalize: object) -> None:
    """Raise ValueError unless ``normalize`` is one of the known choices."""
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize should be 'softmax' or None, got {normalize!r}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be a bool, got {value!r}")


def check_channels(channels: object) -> None:
    """Check a number of channels.

    Raises:
        TypeError: not an int.
        ValueError: not positive.
    """
    if not isinstance(channels, Integral) or isinstance(channels, bool):
        raise TypeError(f"channels should be an int, got {channels!r}")
    if int(channels) < 1:
        raise ValueError(f"channels should be at least 1, got {channels!r}")


def check_parameter_dtype(dtype: object) -> None:
    """Raise ValueError unless ``dtype`` is None or one that ``alpha`` can have."""
    if dtype is not None and dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"dtype should be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {dtype!r}"
        )


def check_map(op: str, x: object) -> None:
    """Check the feature map of a call of ``op``.

    Raises:
        TypeError: not a Tensor.
        NotImplementedError: a layout or a dtype that no backend computes.
        RuntimeError: a shape that is none of a map.
    """
    if not isinstance(x, Tensor):
        raise _not_a_tensor(op, "x", 1, x)
    _check_dense(op, "x", x)
    _check_dtype(op, x)
    _check_size(x)


def check_tensors(
    x: object, alpha: object, num_candidates: int, op: str = "fused_meta_pool"
) -> None:
    """Check ``x``, ``alpha`` and how they go together.

    Raises:
        TypeError: one of them is not a Tensor.
        NotImplementedError: a layout or a dtype that no backend computes.
        RuntimeError: a shape, dtype or device that does not fit.
    """
    if not isinstance(x, Tensor):
        raise _not_a_tensor(op, "x", 1, x)
    if not isinstance(alpha, Tensor):
        raise _not_a_tensor(op, "alpha", 2, alpha)
    _check_dense(op, "x", x)
    _check_dense(op, "alpha", alpha)
    _check_dtype(op, x)
    if alpha.dtype is not x.dtype and alpha.dtype is not torch.float32:
        raise RuntimeError(
            f"alpha should have dtype {x.dtype} as x, or torch.float32, got {alpha.dtype} "
            f"with x of {x.dtype}"
        )
    if x.device != alpha.device:
        raise RuntimeError(
            "x and alpha should be on the same device, "
            f"got x on {x.device} and alpha on {alpha.device}"
        )
    _check_size(x)
    _check_alpha_shape(x, alpha, num_candidates)


def check_norm(momentum: object, eps: object) -> None:
    """Check how statistics are kept and what is added to variances.

    Raises:
        TypeError: one of them is no number.
        ValueError: momentum is not from 0 to 1, or eps not above 0 and finite.
    """
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} should be a number, got {value!r}")
    if not 0 <= float(momentum) <= 1:  # type: ignore[arg-type]
        raise ValueError(f"momentum should be from 0 to 1, got {momentum!r}")
    if not 0 < float(eps) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"eps should be above 0 and finite, got {eps!r}")


def check_statistics(
    running_mean: object, running_var: object, x: Tensor, num_candidates: int, training: bool
) -> None:
    """Check the running statistics of a call.

    Raises:
        TypeError: one of them is neither a Tensor nor None.
        RuntimeError: one is missing, or has a shape, dtype or device that does not fit.
    """
    given = {"running_mean": running_mean, "running_var": running_var}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1 or (missing and not training):
        raise RuntimeError(
            f"{' and '.join(missing)} should be given: both are needed to normalise with "
            "training=False, and to keep statistics with training=True"
        )
    shape = (num_candidates, x.shape[-3])
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} should be a Tensor or None, not {type(value).__name__}")
        if value.shape != shape:
            raise RuntimeError(
                f"{name} should have shape {list(shape)}, a row for each candidate, got "
                f"{list(value.shape)}"
            )
        if value.dtype not in SUPPORTED_DTYPES:
            raise RuntimeError(f"{name} should have a floating dtype, got {value.dtype}")
        if value.device != x.device:
            raise RuntimeError(f"{name} should be on {x.device} as x, got {value.device}")


def check_values_per_channel(x: Tensor, count: int) -> None:
    """Raise ValueError where there is one value per channel, which has no variance."""
    if count == 1:
        raise ValueError(
            "training needs more than one value per channel to normalise by, got x of shape "
            f"{list(x.shape)}"
        )


def _not_a_tensor(op: str, name: str, position: int, value: object) -> TypeError:
    return TypeError(
        f"{op}(): argument '{name}' (position {position}) should be a Tensor, "
        f"not {type(value).__name__}"
    )


def _check_dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.is_nested:  # before the layout, which some of these have as all others
        raise NotImplementedError(
            f"{op}: {name} should be a dense tensor, got a "
            "nested one; pad it with torch.nested.to_padded_tensor(), or call once for each map"
        )
    if tensor.layout is not torch.strided:
        raise NotImplementedError(
            f"{op}: {name} should be a dense tensor, got layout {tensor.layout}; "
            "convert it with to_dense()"
        )


def _check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in SUPPORTED_DTYPES:
        raise NotImplementedError(
            f"\"{op}\" not implemented for '{str(x.dtype).removeprefix('torch.')}'; "
            "x should be float32, float64, float16 or bfloat16"
        )


def _check_size(x: Tensor) -> None:
    size = x.shape
    if len(size) not in (3, 4):
        raise RuntimeError(f"x should be 3-D (C, H, W) or 4-D (N, C, H, W), got {list(size)}")
    if 0 in size[-3:]:
        raise RuntimeError(f"x should have non-zero channels, height and width, got {list(size)}")


def _check_alpha_shape(x: Tensor, alpha: Tensor, num_candidates: int) -> None:
    size, rows = x.shape, alpha.shape[:-1]
    if alpha.dim() == 0 or alpha.shape[-1] != num_candidates:
        got = "none" if alpha.dim() == 0 else alpha.shape[-1]
        raise RuntimeError(
            f"alpha should contain {num_candidates} elements not {got}, one for each candidate "
            f"on its last axis; got shape {list(alpha.shape)}"
        )
    n, c = (1, size[0]) if len(size) == 3 else (size[0], size[1])
    if len(rows) > 0 and rows not in ((c,), (n, 1), (n, c)):
        k = num_candidates
        raise RuntimeError(
            f"alpha should have shape [{k}], [{c}, {k}], [{n}, 1, {k}] or [{n}, {c}, {k}] "
            f"for x of shape {list(size)}, got {list(alpha.shape)}"
        )
