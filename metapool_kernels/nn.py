"""Modules around :func:`metapool_kernels.fused_meta_pool`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metapool_kernels.candidates import (
    DEFAULT_CANDIDATES,
    Candidate,
    Kind,
    parse_candidate,
    parse_candidates,
)
from metapool_kernels.checks import check_flag, check_normalize, check_skip_connect, check_stride
from metapool_kernels.dispatch import check_backend
from metapool_kernels.functional import fused_meta_pool

INITIAL_ALPHA_STD = 1e-3


class MetaPool2d(nn.Module):
    """Learnable mixture of candidate poolings; owns ``alpha`` and calls the fused op.

    Args:
        candidates (sequence of str): the K candidates, see
            :func:`metapool_kernels.fused_meta_pool`.
        channels (int or None): with a number C, each channel has its own mixture and ``alpha``
            has shape (C, K); with None all share one of shape (K,). Default: None.
        normalize, stride, count_include_pad, backend: as for the op.
        device, dtype: where and in which dtype ``alpha`` is created.

    Shape:
        (N, C, H, W) or (C, H, W) to the same with H_out = (H - 1) // stride + 1.

    ``alpha`` starts at ``1e-3 * randn``.
    """

    alpha: nn.Parameter

    def __init__(
        self,
        candidates: Sequence[str] = DEFAULT_CANDIDATES,
        channels: int | None = None,
        *,
        normalize: str | None = "softmax",
        stride: int | tuple[int, int] = 1,
        count_include_pad: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parsed = parse_candidates(candidates)
        check_normalize(normalize)
        check_flag("count_include_pad", count_include_pad)
        check_backend(backend)
        self.candidates = tuple(candidate.name for candidate in parsed)
        self.channels = channels
        self.normalize = normalize
        self.stride = check_stride(stride)
        check_skip_connect(parsed, self.stride)
        self.count_include_pad = count_include_pad
        self.backend = backend
        shape = (len(parsed),) if channels is None else (channels, len(parsed))
        self.alpha = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``alpha`` anew."""
        nn.init.normal_(self.alpha, std=INITIAL_ALPHA_STD)

    def forward(self, x: Tensor) -> Tensor:
        return fused_meta_pool(
            x,
            self.alpha,
            self.candidates,
            normalize=self.normalize,
            stride=self.stride,
            count_include_pad=self.count_include_pad,
            backend=self.backend,
        )

    def weights(self) -> Tensor:
        """The weight of each candidate, in the shape and dtype of ``alpha``."""
        return torch.softmax(self.alpha, -1) if self.normalize == "softmax" else self.alpha

    def reduce(self, keep: Sequence[int]) -> "MetaPool2d":
        """A new module with the candidates at the positions ``keep`` alone, in that order.

        It starts from their present ``alpha``; under softmax their weights sum to one again.

        Raises:
            ValueError: no position, a repeated one, or one that does not exist.
        """
        size = len(self.candidates)
        keep = [int(k) for k in keep]
        if not keep or len(set(keep)) != len(keep) or not all(0 <= k < size for k in keep):
            raise ValueError(
                f"keep should hold distinct positions from 0 to {size - 1}, got {keep}"
            )
        reduced = MetaPool2d(
            [self.candidates[k] for k in keep],
            self.channels,
            normalize=self.normalize,
            stride=self.stride,
            count_include_pad=self.count_include_pad,
            backend=self.backend,
            device=self.alpha.device,
            dtype=self.alpha.dtype,
        )
        with torch.no_grad():
            reduced.alpha.copy_(self.alpha[..., keep])
        reduced.alpha.requires_grad_(self.alpha.requires_grad)
        return reduced.train(self.training)

    def to_torch(self) -> nn.Module:
        """A module made of ``torch.nn`` poolings that gives the same output, weights frozen.

        One candidate of weight 1 becomes that pooling itself (``nn.Identity`` for
        ``skip_connect``), anything else a :class:`WeightedSum` of them.
        """
        pools = [
            _torch_pool(parse_candidate(name), self.stride, self.count_include_pad)
            for name in self.candidates
        ]
        weights = self.weights().detach()
        if len(pools) == 1 and bool((weights == 1).all()):
            return pools[0]
        return WeightedSum(pools, weights)

    def extra_repr(self) -> str:
        """The arguments that make this module."""
        return (
            f"{self.candidates}, channels={self.channels}, normalize={self.normalize!r}, "
            f"stride={self.stride}, count_include_pad={self.count_include_pad}"
        )


class SpatialEnhancer(nn.Module):
    """The parameterized spatial enhancer of PMPL: MetaPool2d, BatchNorm2d, Hardswish.

    Args:
        channels (int): channels C of the feature map.
        candidates (sequence of str): the K candidates.
        per_channel (bool): one mixture for each channel instead of one for all. Default: False.
        normalize, stride, count_include_pad, backend, device, dtype: as for
            :class:`MetaPool2d`.

    Source: Dong et al., "Progressive Meta-Pooling Learning for Lightweight Image Classification
    Model", ICASSP 2023.
    """

    def __init__(
        self,
        channels: int,
        candidates: Sequence[str] = DEFAULT_CANDIDATES,
        *,
        per_channel: bool = False,
        normalize: str | None = "softmax",
        stride: int | tuple[int, int] = 1,
        count_include_pad: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.pool: nn.Module = MetaPool2d(
            candidates,
            channels if per_channel else None,
            normalize=normalize,
            stride=stride,
            count_include_pad=count_include_pad,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.pool(x)))
        return out

    def reduce(self, keep: Sequence[int]) -> None:
        """Replace the pooling by :meth:`MetaPool2d.reduce` of itself; the rest stays."""
        self.pool = self._meta_pool().reduce(keep)

    def to_torch(self) -> nn.Sequential:
        """Plain ``torch.nn`` modules with the same output; norm and activation are shared."""
        return nn.Sequential(self._meta_pool().to_torch(), self.norm, self.act)

    def _meta_pool(self) -> MetaPool2d:
        assert isinstance(self.pool, MetaPool2d)
        return self.pool


class WeightedSum(nn.Module):
    """Sum of the outputs of K modules with fixed weights, shape (K,) or (C, K)."""

    weights: Tensor

    def __init__(self, modules: Sequence[nn.Module], weights: Tensor) -> None:
        super().__init__()
        self.pools = nn.ModuleList(modules)
        self.register_buffer("weights", weights.clone())

    def forward(self, x: Tensor) -> Tensor:
        per_module = self.weights[..., None, None].unbind(-3)
        terms = [
            weight.to(x.dtype) * pool(x)
            for weight, pool in zip(per_module, self.pools, strict=True)
        ]
        return torch.stack(terms).sum(0)


class _Zeros(nn.Module):
    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[..., :: self.stride[0], :: self.stride[1]])


def _torch_pool(
    candidate: Candidate, stride: tuple[int, int], count_include_pad: bool
) -> nn.Module:
    window = (candidate.kh, candidate.kw)
    padding = (candidate.kh // 2, candidate.kw // 2)
    if candidate.kind is Kind.SKIP:
        return nn.Identity()
    if candidate.kind is Kind.NONE:
        return _Zeros(stride)
    if candidate.kind is Kind.AVG:
        return nn.AvgPool2d(window, stride, padding, count_include_pad=count_include_pad)
    return nn.MaxPool2d(window, stride, padding)
