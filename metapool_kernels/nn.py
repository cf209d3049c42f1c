"""Modules around :func:`metapool_kernels.fused_meta_pool`."""

from collections.abc import Mapping, Sequence
from operator import index

import torch
from torch import Tensor, nn

from metapool_kernels.candidates import (
    DEFAULT_CANDIDATES,
    Candidate,
    Kind,
    candidate_names,
    parse_candidate,
    parse_candidates,
)
from metapool_kernels.checks import (
    check_channels,
    check_flag,
    check_normalize,
    check_parameter_dtype,
    check_skip_connect,
    check_stride,
)
from metapool_kernels.dispatch import check_backend
from metapool_kernels.functional import fused_meta_pool

INITIAL_ALPHA_STD = 1e-3

# torch.fx traces with stand-ins for tensors, which the checks would refuse: the call is one node.
torch.fx.wrap("fused_meta_pool")


class MetaPool2d(nn.Module):
    """Learnable mixture of candidate poolings; owns ``alpha`` and calls the fused op.

    Args:
        candidates (sequence of str): the K candidates, see
            :func:`metapool_kernels.fused_meta_pool`.
        channels (int or None): with a number C, each channel has its own mixture and ``alpha``
            has shape (C, K); with None all share one of shape (K,). Default: None.
        normalize, stride, count_include_pad, backend: as for the op.
        extra_candidates (mapping of str to nn.Module or None): E more candidates, by name, that
            need not be poolings and may have weights of their own: modules that turn (N, C, H, W)
            into the same shape. ``alpha`` then ends with E entries for them; the softmax is over
            all K + E. ``candidates`` may be empty beside them. Only at stride 1. Default: None.
        device, dtype: where and in which dtype ``alpha`` is created; extra candidates stay as
            they are.

    Shape:
        (N, C, H, W) or (C, H, W) to the same with H_out = (H - 1) // stride + 1.

    ``alpha`` starts at ``1e-3 * randn``.
    """

    alpha: nn.Parameter
    extras: nn.ModuleDict | None

    def __init__(
        self,
        candidates: Sequence[str] = DEFAULT_CANDIDATES,
        channels: int | None = None,
        *,
        normalize: str | None = "softmax",
        stride: int | tuple[int, int] = 1,
        count_include_pad: bool = True,
        backend: str | None = None,
        extra_candidates: Mapping[str, nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        extras = _as_modules(extra_candidates)
        names = candidate_names(candidates)
        parsed = parse_candidates(names) if names or not extras else ()
        if channels is not None:
            check_channels(channels)
        check_parameter_dtype(dtype)
        check_normalize(normalize)
        check_flag("count_include_pad", count_include_pad)
        check_backend(backend)
        self.candidates = tuple(candidate.name for candidate in parsed)
        self.channels = channels
        self.normalize = normalize
        self.stride = check_stride(stride)
        check_skip_connect(parsed, self.stride)
        if extras and self.stride != (1, 1):
            raise ValueError(
                f"extra candidates ({', '.join(extras)}) need stride 1, got {self.stride}; leave "
                "them out"
            )
        self.extras = nn.ModuleDict(extras) if extras else None
        self.count_include_pad = count_include_pad
        self.backend = backend
        size = len(self.candidate_names)
        shape = (size,) if channels is None else (channels, size)
        self.alpha = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``alpha`` anew."""
        nn.init.normal_(self.alpha, std=INITIAL_ALPHA_STD)

    @property
    def candidate_names(self) -> tuple[str, ...]:
        """All candidates in the order of ``alpha``: the poolings, then the extra ones."""
        return self.candidates if self.extras is None else (*self.candidates, *self.extras)

    def forward(self, x: Tensor) -> Tensor:
        if self.extras is None:
            return self._pool(x, self.alpha, self.normalize)
        if x.dim() == 3:
            return self._mix(x.unsqueeze(0), self.extras).squeeze(0)
        return self._mix(x, self.extras)

    def _pool(self, x: Tensor, alpha: Tensor, normalize: str | None) -> Tensor:
        return fused_meta_pool(
            x,
            alpha,
            self.candidates,
            normalize=normalize,
            stride=self.stride,
            count_include_pad=self.count_include_pad,
            backend=self.backend,
        )

    def _mix(self, x: Tensor, extras: nn.ModuleDict) -> Tensor:
        accumulate = torch.float64 if x.dtype is torch.float64 else torch.float32
        if self.normalize == "softmax":
            weights = torch.softmax(self.alpha, -1, dtype=accumulate)
        else:
            weights = self.alpha.to(accumulate)
        pools = len(self.candidates)
        terms = [self._pool(x, weights[..., :pools], None).to(accumulate)] if pools else []
        for k, (name, extra) in enumerate(extras.items(), pools):
            out = extra(x)
            if out.shape != x.shape:
                raise RuntimeError(
                    f"extra candidate {name!r} should give the shape that it gets, "
                    f"{tuple(x.shape)}, got {tuple(out.shape)}"
                )
            terms.append(weights[..., k, None, None] * out.to(accumulate))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total.to(x.dtype)

    def weights(self) -> Tensor:
        """The weight of each candidate, in the shape and dtype of ``alpha``."""
        return torch.softmax(self.alpha, -1) if self.normalize == "softmax" else self.alpha

    def reduce(self, keep: Sequence[int]) -> "MetaPool2d":
        """A new module with the candidates at the positions ``keep`` alone, in that order.

        Positions count through :attr:`candidate_names`; of those kept the poolings come first
        here too, then the extra candidates, which are shared with this module and not copied.
        It starts from their present ``alpha``; under softmax their weights sum to one again.

        Raises:
            TypeError: ``keep`` is no sequence of ints.
            ValueError: no position, a repeated one, or one that does not exist.
        """
        names, pools = self.candidate_names, len(self.candidates)
        size = len(names)
        try:
            keep = [index(k) for k in keep]
        except TypeError as error:
            raise TypeError(f"keep should be a sequence of ints, got {keep!r}") from error
        if not keep or len(set(keep)) != len(keep) or not all(0 <= k < size for k in keep):
            raise ValueError(
                f"keep should hold distinct positions from 0 to {size - 1}, got {keep}"
            )
        keep.sort(key=lambda k: k >= pools)
        extras = {} if self.extras is None else dict(self.extras.items())
        reduced = MetaPool2d(
            [names[k] for k in keep if k < pools],
            self.channels,
            normalize=self.normalize,
            stride=self.stride,
            count_include_pad=self.count_include_pad,
            backend=self.backend,
            extra_candidates={names[k]: extras[names[k]] for k in keep if k >= pools},
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
        ``skip_connect``), anything else a :class:`WeightedSum` of them. Extra candidates are
        shared with this module and not copied.
        """
        pools = [
            _torch_pool(parse_candidate(name), self.stride, self.count_include_pad)
            for name in self.candidates
        ]
        pools += (self.extras or {}).values()
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
        normalize, stride, count_include_pad, backend, extra_candidates, device, dtype: as for
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
        extra_candidates: Mapping[str, nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_channels(channels)
        check_flag("per_channel", per_channel)
        self.pool: nn.Module = MetaPool2d(
            candidates,
            channels if per_channel else None,
            normalize=normalize,
            stride=stride,
            count_include_pad=count_include_pad,
            backend=backend,
            extra_candidates=extra_candidates,
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


def _as_modules(extras: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(
            f"extra_candidates should map names to modules, got {extras!r} of {type(extras)!r}"
        )
    modules = dict(extras or {})
    taken = nn.ModuleDict()
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"extra candidate {name!r} should be an nn.Module, got {type(module)!r}"
            )
        named = isinstance(name, str) and name.isidentifier() and not _is_pooling(name)
        if not named or hasattr(taken, name):
            raise ValueError(
                f"an extra candidate should be named by letters, digits and underscores, and not "
                f"as a pooling or an attribute of nn.ModuleDict is, got {name!r}"
            )
    return modules


def _is_pooling(name: str) -> bool:
    try:
        parse_candidate(name)
    except ValueError:
        return False
    return True


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
