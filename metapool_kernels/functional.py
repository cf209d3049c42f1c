"""The op, in its forms."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from metapool_kernels import autograd, checks, normalized, reference
from metapool_kernels.candidates import (
    DEFAULT_CANDIDATES,
    Candidate,
    candidate_names,
    normalized_positions,
    parse_candidates,
)
from metapool_kernels.dispatch import choose_backend
from metapool_kernels.layout import is_channels_last
from metapool_kernels.spec import PoolSpec


class _Settings(NamedTuple):
    """What a call says beside its tensors, checked and in the forms that the backends take."""

    candidates: tuple[Candidate, ...]
    stride: tuple[int, int]
    specs: dict[str, tuple[PoolSpec, PoolSpec]]
    """For each backend that has ops, with contiguous maps and with channels last."""
    normalized: list[int]
    """Positions of the candidates that :func:`fused_normalized_meta_pool` normalises."""


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
    return _Settings(candidates, stride, specs, normalized_positions(candidates))


# Calls repeat their settings, so the answer is kept. torch.compile looks through such a cache with
# a warning, and is given the plain function.
_kept_settings = lru_cache(maxsize=1024)(_settings)


def _check_settings(
    candidates: Sequence[str], stride: int | tuple[int, int], count_include_pad: bool
) -> _Settings:
    """What a call says, or an error about it."""
    names, steps = candidate_names(candidates), checks.check_stride(stride)
    checks.check_flag("count_include_pad", count_include_pad)
    make_settings = _settings if torch.compiler.is_compiling() else _kept_settings
    return make_settings(names, steps, count_include_pad)


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
    checks.check_normalize(normalize)
    settings = _check_settings(candidates, stride, count_include_pad)
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
        stride, count_include_pad, backend: as for :func:`fused_meta_pool`.

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
    settings = _check_settings(candidates, stride, count_include_pad)
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


def fused_normalized_meta_pool(
    x: Tensor,
    alpha: Tensor,
    candidates: Sequence[str],
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    normalize: str | None = "softmax",
    stride: int | tuple[int, int] = 1,
    count_include_pad: bool = True,
    backend: str | None = None,
    process_group: Any = None,
) -> Tensor:
    r"""Alpha-weighted sum of candidate poolings, each batch-normalised before it is weighted.

    .. math::
        y_{n,c} = \sum_k w_{n,c,k} \frac{P_k(x_{n,c}) - \mu_{k,c}}{\sqrt{v_{k,c} + \epsilon}}

    The mixed operation of DARTS, whose poolings end in a BatchNorm without affine parameters.
    ``skip_connect`` and ``none`` are not normalised. With ``training`` the mean and the biased
    variance are those of each candidate's values over N, H and W, else the running ones. No pooled
    map is kept for backward: ``x``, the weights and two numbers per channel and candidate are.
    Derivatives of every order; those of second order and of torch.func, and calls within
    torch.compile, hold all K poolings at a time.

    Args:
        x (Tensor[N, C, H, W] or Tensor[C, H, W]): as for :func:`fused_meta_pool`.
        alpha (Tensor[K], [C, K], [N, 1, K] or [N, C, K]): as for :func:`fused_meta_pool`.
        candidates (sequence of str): the K poolings, named as for :func:`fused_meta_pool`.
        running_mean, running_var (Tensor[K, C] or None): statistics of each candidate and channel
            on the device of ``x``. With ``training`` they are changed in place, the variance as an
            unbiased one; rows of what is not normalised stay. Needed without ``training``.
        training (bool): whether to normalise by the statistics of this batch. Default: False.
        momentum (float): share of this batch in the new running statistics, 0 to 1. Default: 0.1.
        eps (float): added to variances, above 0. Default: 1e-5.
        normalize, stride, count_include_pad, backend: as for :func:`fused_meta_pool`.
        process_group (ProcessGroup or None): processes whose batches are normalised together, as
            :class:`torch.nn.SyncBatchNorm` does. Default: None, this process alone.

    Returns:
        Tensor[N, C, H_out, W_out] (without N for 3-D ``x``), as :func:`fused_meta_pool`.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :func:`fused_meta_pool`; also a
            ValueError with ``training`` and one value per channel, as a BatchNorm raises, and a
            RuntimeError for running statistics that do not fit.

    Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019.
    """
    tensors = tuple(t for t in (x, alpha, running_mean, running_var) if t is not None)
    if has_torch_function(tensors):
        out: Tensor = handle_torch_function(
            fused_normalized_meta_pool,
            tensors,
            x,
            alpha,
            candidates,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            normalize=normalize,
            stride=stride,
            count_include_pad=count_include_pad,
            backend=backend,
            process_group=process_group,
        )
        return out
    checks.check_normalize(normalize)
    checks.check_flag("training", training)
    checks.check_norm(momentum, eps)
    settings = _check_settings(candidates, stride, count_include_pad)
    op = "fused_normalized_meta_pool"
    checks.check_tensors(x, alpha, len(settings.candidates), op)
    checks.check_statistics(running_mean, running_var, x, len(settings.candidates), training)
    chosen = choose_backend(backend, x)

    batch = x if x.dim() == 4 else x.unsqueeze(0)
    pools = settings.normalized
    channels_last = is_channels_last(batch)
    kernels = "cpu" if chosen == "reference" else chosen
    spec = settings.specs[kernels][int(channels_last)]

    def side_by_side(x: Tensor) -> Tensor:
        if chosen == "reference":
            return reference.multi_pool(
                x, settings.candidates, settings.stride, count_include_pad, channels_last
            )
        return autograd.pool(x, None, None, spec)

    call = normalized.Call(spec, pools, side_by_side, eps, process_group)
    given = None
    if not training:
        assert running_mean is not None and running_var is not None
        given = normalized.Moments(running_mean[pools], running_var[pools], 0)
    weights = mixture_weights(alpha, x, normalize)
    out, moments = normalized.normalized_pool(
        batch, weights, given, call, fused=chosen != "reference"
    )
    if training and pools:  # of all processes
        checks.check_values_per_channel(x, moments.size)
    if training and running_mean is not None and running_var is not None and moments.size > 1:
        with torch.no_grad():
            unbiased = moments.variance * (moments.size / (moments.size - 1))
            for running, new in ((running_mean, moments.mean), (running_var, unbiased)):
                kept = running[pools]
                running[pools] = kept + momentum * (new.detach().to(running.dtype) - kept)
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
