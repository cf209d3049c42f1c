"""The op, in its forms."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from metapool_kernels import autograd, checks, reference
from metapool_kernels.candidates import (
    DEFAULT_CANDIDATES,
    Candidate,
    candidate_names,
    parse_candidates,
)
from metapool_kernels.dispatch import choose_backend
from metapool_kernels.layout import is_channels_last
from metapool_kernels.ops import PoolSpec


class _Settings(NamedTuple):
    """What a call says beside its tensors, checked and in the forms that the backends take."""

    candidates: tuple[Candidate, ...]
    stride: tuple[int, int]
    specs: dict[str, tuple[PoolSpec, PoolSpec]]
    """For each backend that has ops, with contiguous maps and with channels last."""


def _settings(
    names: tuple[str, ...], stride: tuple[int, int], count_include_pad: bool
) -> _Settings:
    candidates = parse_candidates(names)
    checks.check_skip_connect(candidates, stride)
    codes = tuple(candidate.code for candidate in candidates)
    specs = {
        backend: (
            PoolSpec(codes, stride, count_include_pad, False, backend),
            PoolSpec(codes, stride, count_include_pad, True, backend),
        )
        for backend in ("cpu", "triton", "cuda")
    }
    return _Settings(candidates, stride, specs)


# Calls repeat their settings, so the answer is kept. torch.compile looks through such a cache with
# a warning, and is given the plain function.
_kept_settings = lru_cache(maxsize=1024)(_settings)


def fused_meta_pool(
    x: Tensor,
    alpha: Tensor,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    *,
    normalize: str | None = "softmax",
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Alpha-weighted sum of candidate poolings of a feature map, in one pass.

    .. math:: y_{n,c} = \sum_k w_{n,c,k} P_k(x_{n,c}), \qquad w = \mathrm{softmax}(\alpha)

    Differentiable to every order in ``x`` and ``alpha``, in backward and forward mode. Only ``x``
    and the weights are saved for backward. Sums run in float32 (float64 for float64 ``x``) and
    are rounded once. The result is the same bit for bit from run to run and for any number of
    threads.

    Args:
        x (Tensor[N, C, H, W] or Tensor[C, H, W]): the feature map; float32, float64, float16 or
            bfloat16, any strides. N may be 0.
        alpha (Tensor[K], [C, K], [N, 1, K] or [N, C, K]): architecture parameters, the last axis
            in the order of ``candidates``; float32 or the dtype of ``x``, on its device.
        candidates (sequence of str): the K poolings: ``"skip_connect"`` (``x`` itself, stride 1
            only), ``"none"`` (zeros), ``"avg_pool_{kh}x{kw}"``, ``"max_pool_{kh}x{kw}"``, each
            padded by half its window; kh and kw odd, 1 to 15, in pixels. A name may occur twice.
            Default: :data:`metapool_kernels.DEFAULT_CANDIDATES`.
        normalize (str or None): ``"softmax"`` over the last axis, or None to take ``alpha`` as
            the weights. Default: ``"softmax"``.
        stride (int or (int, int)): rows and columns between windows, in pixels. Default: 1.
        count_include_pad (bool): whether the divisor of an average counts the padding.
            Default: True.
        backend (str or None): ``"cpu"``, ``"reference"``, ``"triton"`` or ``"cuda"`` forces one;
            None chooses the fastest that can run the call, and warns once in a process where that
            is ``"reference"`` though there are kernels for the device. Default: None.

    Returns:
        Tensor[N, C, H_out, W_out] (without N for 3-D ``x``) with the dtype of ``x`` and
        ``H_out = (H - 1) // stride + 1``; channels_last for channels_last ``x``, else contiguous.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a candidate, stride, normalize or backend that is not allowed.
        RuntimeError: shapes, dtypes or devices that do not fit, or a forced backend that is not
            available here.
        NotImplementedError: a dtype or layout of ``x`` that is not supported.

    The poolings are those of :func:`torch.nn.functional.avg_pool2d` and
    :func:`torch.nn.functional.max_pool2d`, including NaN, infinities and the choice among equal
    maxima. The mixture follows Dong et al., "Progressive Meta-Pooling Learning for Lightweight
    Image Classification Model", ICASSP 2023.
    """
    # As for PyTorch's own functions: torch.fx traces with stand-ins, which make it one node.
    if has_torch_function((x, alpha)):
        out: Tensor = handle_torch_function(
            fused_meta_pool,
            (x, alpha),
            x,
            alpha,
            candidates,
            normalize=normalize,
            stride=stride,
            count_include_pad=count_include_pad,
            backend=backend,
        )
        return out
    names, steps = candidate_names(candidates), checks.check_stride(stride)
    checks.check_normalize(normalize)
    checks.check_flag("count_include_pad", count_include_pad)
    make_settings = _settings if torch.compiler.is_compiling() else _kept_settings
    settings = make_settings(names, steps, count_include_pad)
    checks.check_tensors(x, alpha, len(settings.candidates))
    chosen = choose_backend(backend, x)

    weights = mixture_weights(alpha, x, normalize)
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    channels_last = is_channels_last(batch)
    if chosen == "reference":
        out = reference.meta_pool(
            batch,
            weights,
            settings.candidates,
            settings.stride,
            count_include_pad,
            channels_last,
        )
    else:
        out = autograd.pool(batch, weights, None, settings.specs[chosen][int(channels_last)])
    return out if x.dim() == 4 else out.squeeze(0)


def fused_multi_pool(
    x: Tensor,
    candidates: Sequence[str],
    *,
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Candidate poolings of a feature map side by side, in one pass.

    .. math:: y = [P_1(x), \ldots, P_K(x)]

    What ``torch.cat([pool(x) for pool in pools], 1)`` gives, as in spatial pyramid pooling (SPP and
    SPPF of the YOLO family): maxima are the same numbers, but for the sign of a zero, and their
    gradients go to the same elements. Differentiable to every order, in backward and forward mode;
    only ``x`` is saved for backward. The result is the same bit for bit from run to run and for any
    number of threads.

    Args:
        x (Tensor[N, C, H, W] or Tensor[C, H, W]): the feature map; float32, float64, float16 or
            bfloat16, any strides. N may be 0.
        candidates (sequence of str): the K poolings, named as for :func:`fused_meta_pool`. A name
            may occur twice.
        stride, count_include_pad, backend: as for :func:`fused_meta_pool`. Triton and CUDA launch
            a kernel for each pooling.

    Returns:
        Tensor[N, K * C, H_out, W_out] (without N for 3-D ``x``), all channels of a candidate
        together, with the dtype of ``x`` and ``H_out = (H - 1) // stride + 1``; channels_last for
        channels_last ``x``, else contiguous.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a candidate, stride or backend that is not allowed.
        RuntimeError: a shape that is none of a map, or a forced backend that is not available here.
        NotImplementedError: a dtype or layout of ``x`` that is not supported.

    Source: He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual
    Recognition", ECCV 2014.
    """
    if has_torch_function((x,)):
        out: Tensor = handle_torch_function(
            fused_multi_pool,
            (x,),
            x,
            candidates,
            stride=stride,
            count_include_pad=count_include_pad,
            backend=backend,
        )
        return out
    names, steps = candidate_names(candidates), checks.check_stride(stride)
    checks.check_flag("count_include_pad", count_include_pad)
    make_settings = _settings if torch.compiler.is_compiling() else _kept_settings
    settings = make_settings(names, steps, count_include_pad)
    checks.check_map("fused_multi_pool", x)
    chosen = choose_backend(backend, x)

    batch = x if x.dim() == 4 else x.unsqueeze(0)
    channels_last = is_channels_last(batch)
    if chosen == "reference":
        out = reference.multi_pool(
            batch, settings.candidates, settings.stride, count_include_pad, channels_last
        )
    else:
        out = autograd.pool(batch, None, None, settings.specs[chosen][int(channels_last)])
    return out if x.dim() == 4 else out.squeeze(0)


def mixture_weights(alpha: Tensor, x: Tensor, normalize: str | None) -> Tensor:
    """The weight of each candidate, in the dtype in which sums over ``x`` run."""
    if has_torch_function((alpha, x)):
        out: Tensor = handle_torch_function(mixture_weights, (alpha, x), alpha, x, normalize)
        return out
    accumulate = torch.float64 if x.dtype is torch.float64 else torch.float32
    if normalize == "softmax":
        return torch.softmax(alpha, -1, dtype=accumulate)
    return alpha.to(accumulate)
