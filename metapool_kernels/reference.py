"""The definition of the op in plain PyTorch.

Slow, readable and right on every device. It is the fallback where no faster backend can run,
the truth that the tests compare with (in float64), and the eager baseline of the benchmarks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metapool_kernels.candidates import Candidate, Kind
from metapool_kernels.layout import in_layout


def pool(
    x: Tensor, candidate: Candidate, stride: tuple[int, int], count_include_pad: bool
) -> Tensor:
    """One candidate pooling ``P_k(x)`` of ``x``, shape (N, C, H, W)."""
    window = (candidate.kh, candidate.kw)
    padding = (candidate.kh // 2, candidate.kw // 2)
    if candidate.kind is Kind.SKIP:
        return x
    if candidate.kind is Kind.NONE:
        return torch.zeros_like(x[..., :: stride[0], :: stride[1]])
    if candidate.kind is Kind.AVG:
        return F.avg_pool2d(x, window, stride, padding, count_include_pad=count_include_pad)
    return F.max_pool2d(x, window, stride, padding)


def multi_pool(
    x: Tensor,
    candidates: Sequence[Candidate],
    stride: tuple[int, int],
    count_include_pad: bool,
    channels_last: bool,
) -> Tensor:
    """All candidate poolings side by side, (N, K * C, H_out, W_out) in the dtype of ``x``."""
    wide = x if x.dtype is torch.float64 else x.float()
    pooled = [pool(wide, candidate, stride, count_include_pad) for candidate in candidates]
    if all(candidate.kind is Kind.NONE for candidate in candidates):
        # Zeros that come from x, and not from nowhere: their gradient is zero, and not missing.
        nowhere = torch.zeros((), dtype=torch.bool, device=x.device)
        centers = wide[..., :: stride[0], :: stride[1]]
        pooled = [torch.where(nowhere, centers, zeros) for zeros in pooled]
    return in_layout(torch.cat(pooled, 1).to(x.dtype), channels_last)


def mix(
    x: Tensor,
    weights: Tensor,
    candidates: Sequence[Candidate],
    stride: tuple[int, int],
    count_include_pad: bool,
) -> Tensor:
    """The weighted sum of all candidate poolings, one after the other.

    Args:
        x: (N, C, H, W).
        weights: (K,), or anything that broadcasts to (N, C, K), on the device of ``x``.
        candidates: the K candidates.
        stride: rows and columns between neighbouring windows, in pixels.
        count_include_pad: whether padding counts in the divisor of an average.

    Returns:
        (N, C, H_out, W_out) in the promoted dtype of ``x`` and ``weights``.
    """
    per_candidate = weights[..., None, None].unbind(-3)
    terms = (
        weight * pool(x, candidate, stride, count_include_pad)
        for weight, candidate in zip(per_candidate, candidates, strict=True)
    )
    out = next(terms)
    for term in terms:
        out = out + term
    return out


def meta_pool(
    x: Tensor,
    weights: Tensor,
    candidates: Sequence[Candidate],
    stride: tuple[int, int],
    count_include_pad: bool,
    channels_last: bool,
) -> Tensor:
    """:func:`mix` with the accumulation dtype and the memory layout of the op.

    ``weights`` has the accumulation dtype (float64 for float64 ``x``, float32 otherwise); the
    result is rounded to the dtype of ``x`` once, at the end.
    """
    out = mix(x.to(weights.dtype), weights, candidates, stride, count_include_pad)
    return in_layout(out.to(x.dtype), channels_last)
