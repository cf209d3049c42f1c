"""Modules around :func:`metapool_kernels.fused_meta_pool` and its other forms."""

from collections.abc import Mapping, Sequence
from copy import copy
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from metapool_kernels.candidates import (
    DEFAULT_CANDIDATES,
    candidate_names,
    normalized_positions,
    parse_candidates,
)
from metapool_kernels.checks import (
    check_channels,
    check_flag,
    check_norm,
    check_normalize,
    check_parameter_dtype,
    check_skip_connect,
    check_stride,
)
from metapool_kernels.convertible import Convertible, plain_form, plain_pools
from metapool_kernels.dispatch import check_backend
from metapool_kernels.extra_candidates import as_modules, mixed
from metapool_kernels.functional import (
    fused_meta_pool,
    fused_multi_pool,
    fused_normalized_meta_pool,
    mixture_weights,
)
from metapool_kernels.plain import FORM, Form, SideBySide, WeightedSum

INITIAL_ALPHA_STD = 1e-3


class MetaPool2d(Convertible):
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
        extras = as_modules(extra_candidates)
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
        # No question is asked of x here, which is a stand-in while torch.fx traces.
        batch = x[None].flatten(0, -4)  # (C, H, W) gets an N of 1
        weights = mixture_weights(self.alpha, x, self.normalize)
        pools = len(self.candidates)
        outs = [self._pool(batch, weights[..., :pools], None)] if pools else []
        outs += [extra(batch) for extra in self.extras.values()]
        return mixed(batch, weights[..., pools:], outs, tuple(self.extras)).reshape(x.shape)

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

    def weights(self) -> Tensor:
        """The weight of each candidate, in the shape and dtype of ``alpha``."""
        return torch.softmax(self.alpha, -1) if self.normalize == "softmax" else self.alpha

    def reduce(self, keep: Sequence[int]) -> "MetaPool2d":
        """A new module with the candidates at the positions ``keep`` alone, in that order.

        It is of the same class and has the same hooks and, of a subclass, the same attributes.
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
        extras = {names[k]: extras[names[k]] for k in keep if k >= pools}
        reduced = _without_parametrizations(self)
        reduced.candidates = tuple(names[k] for k in keep if k < pools)
        reduced.extras = nn.ModuleDict(extras) if extras else None
        reduced.alpha = nn.Parameter(self.alpha.detach()[..., keep], self.alpha.requires_grad)
        return reduced

    def to_torch(self, form: Form = FORM) -> nn.Module:
        """A module made of ``torch.nn`` poolings that gives the same output, weights frozen.

        One candidate of weight 1 becomes that pooling alone (``nn.Identity`` for
        ``skip_connect``), anything else a :class:`metapool_kernels.plain.WeightedSum` of them.
        A wide window is two strips, see :class:`metapool_kernels.plain.Form`. Extra candidates
        are shared with this module and not copied. Hooks go over to what comes back.

        Raises:
            NotImplementedError: a subclass has a forward of its own and no ``to_torch``.
        """
        self._check_plain_form()
        pools = [*self._plain_candidates(form), *(self.extras or {}).values()]
        weights = self.weights().detach()
        one = len(pools) == 1 and bool((weights == 1).all())
        plain = pools[0] if one else WeightedSum(pools, weights)
        return self._with_hooks(plain)

    def _plain_candidates(self, form: Form) -> list[nn.Module]:
        return plain_pools(self.candidates, self.stride, self.count_include_pad, form)

    def extra_repr(self) -> str:
        """The arguments that make this module."""
        return (
            f"{self.candidates}, channels={self.channels}, normalize={self.normalize!r}, "
            f"stride={self.stride}, count_include_pad={self.count_include_pad}"
        )


class NormalizedMetaPool2d(MetaPool2d):
    """The mixed operation of DARTS: each pooling is normalised before it is weighted.

    As a BatchNorm2d without affine parameters behind each pooling does it, see
    :func:`metapool_kernels.fused_normalized_meta_pool`: by the statistics of the batch in training,
    by running ones in evaluation. ``skip_connect``, ``none`` and extra candidates are not
    normalised.

    Args:
        channels (int): channels C of the feature map.
        candidates (sequence of str): the K candidates.
        per_channel (bool): one mixture for each channel instead of one for all. Default: False.
        momentum (float or None): share of a batch in the running statistics; None weights all
            batches alike. Default: 0.1.
        eps (float): added to variances. Default: 1e-5.
        process_group (ProcessGroup or None): processes whose batches are normalised together in
            training, as :class:`torch.nn.SyncBatchNorm` does. Default: None.
        normalize, stride, count_include_pad, backend, extra_candidates, device, dtype: as for
            :class:`MetaPool2d`.

    Shape:
        (N, C, H, W) or (C, H, W) to the same with H_out = (H - 1) // stride + 1.

    Buffers are ``running_mean`` and ``running_var``, each (K, C), and ``num_batches_tracked``.

    Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        candidates: Sequence[str] = DEFAULT_CANDIDATES,
        *,
        per_channel: bool = False,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        process_group: Any = None,
        normalize: str | None = "softmax",
        stride: int | tuple[int, int] = 1,
        count_include_pad: bool = True,
        backend: str | None = None,
        extra_candidates: Mapping[str, nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_channels(channels)
        check_flag("per_channel", per_channel)
        check_norm(0 if momentum is None else momentum, eps)
        super().__init__(
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
        self.momentum, self.eps, self.process_group = momentum, eps, process_group
        zeros = torch.zeros(len(self.candidates), channels, device=device, dtype=dtype)
        self.register_buffer("running_mean", zeros)
        self.register_buffer("running_var", torch.ones_like(zeros))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    def reset_running_stats(self) -> None:
        """Forget all batches, as :meth:`torch.nn.BatchNorm2d.reset_running_stats`."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def _pool(self, x: Tensor, alpha: Tensor, normalize: str | None) -> Tensor:
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (float(self.num_batches_tracked) + 1) if self.training else 0.0
        out = fused_normalized_meta_pool(
            x,
            alpha,
            self.candidates,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            normalize=normalize,
            stride=self.stride,
            count_include_pad=self.count_include_pad,
            backend=self.backend,
            process_group=self.process_group,
        )
        if self.training:  # what raises an error is no batch
            self.num_batches_tracked.add_(1)
        return out

    def reduce(self, keep: Sequence[int]) -> "NormalizedMetaPool2d":
        """:meth:`MetaPool2d.reduce`; what stays keeps its statistics."""
        reduced = super().reduce(keep)
        assert isinstance(reduced, NormalizedMetaPool2d)
        rows = [k for k in map(index, keep) if k < len(self.candidates)]
        for name in ("running_mean", "running_var"):
            setattr(reduced, name, getattr(self, name)[rows])
        reduced.num_batches_tracked = self.num_batches_tracked.clone()
        return reduced

    def _plain_candidates(self, form: Form) -> list[nn.Module]:
        pools = super()._plain_candidates(form)
        for k in normalized_positions(parse_candidates(self.candidates) if self.candidates else ()):
            norm = nn.BatchNorm2d(self.running_mean.shape[1], self.eps, self.momentum, affine=False)
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean = self.running_mean[k].clone()
            norm.running_var = self.running_var[k].clone()
            norm.num_batches_tracked = self.num_batches_tracked.clone()
            pools[k] = nn.Sequential(pools[k], norm.train(self.training))
        return pools

    def extra_repr(self) -> str:
        """The arguments that make this module."""
        channels = self.running_mean.shape[1]
        return f"{channels}, {super().extra_repr()}, momentum={self.momentum}, eps={self.eps}"


class MultiPool2d(Convertible):
    """Candidate poolings side by side, see :func:`metapool_kernels.fused_multi_pool`.

    Args:
        candidates (sequence of str): the K poolings.
        stride, count_include_pad, backend: as for the op.

    Shape:
        (N, C, H, W) or (C, H, W) to the same with K * C channels, all of a candidate together, and
        H_out = (H - 1) // stride + 1.
    """

    def __init__(
        self,
        candidates: Sequence[str],
        *,
        stride: int | tuple[int, int] = 1,
        count_include_pad: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        parsed = parse_candidates(candidates)
        check_flag("count_include_pad", count_include_pad)
        check_backend(backend)
        self.candidates = tuple(candidate.name for candidate in parsed)
        self.stride = check_stride(stride)
        check_skip_connect(parsed, self.stride)
        self.count_include_pad = count_include_pad
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return fused_multi_pool(
            x,
            self.candidates,
            stride=self.stride,
            count_include_pad=self.count_include_pad,
            backend=self.backend,
        )

    def to_torch(self, form: Form = FORM) -> nn.Module:
        """A module made of ``torch.nn`` poolings that gives the same output.

        A :class:`metapool_kernels.plain.SideBySide`; a wide window is two strips, see
        :class:`metapool_kernels.plain.Form`. Hooks go over to what comes back.

        Raises:
            NotImplementedError: a subclass has a forward of its own and no ``to_torch``.
        """
        self._check_plain_form()
        pools = plain_pools(self.candidates, self.stride, self.count_include_pad, form)
        return self._with_hooks(SideBySide(pools))

    def extra_repr(self) -> str:
        """The arguments that make this module."""
        return (
            f"{self.candidates}, stride={self.stride}, count_include_pad={self.count_include_pad}"
        )


class SpatialEnhancer(Convertible):
    """The parameterized spatial enhancer of PMPL: MetaPool2d, BatchNorm2d, Hardswish.

    Args:
        channels (int): channels C of the feature map.
        candidates (sequence of str): the K candidates.
        per_channel (bool): one mixture for each channel instead of one for all. Default: False.
        candidate_norm (bool): whether each pooling is normalised before it is weighted, as in
            DARTS, by a :class:`NormalizedMetaPool2d`. Default: False.
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
        candidate_norm: bool = False,
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
        check_flag("candidate_norm", candidate_norm)
        options: dict[str, Any] = {
            "normalize": normalize,
            "stride": stride,
            "count_include_pad": count_include_pad,
            "backend": backend,
            "extra_candidates": extra_candidates,
            "device": device,
            "dtype": dtype,
        }
        self.pool: nn.Module = (
            NormalizedMetaPool2d(channels, candidates, per_channel=per_channel, **options)
            if candidate_norm
            else MetaPool2d(candidates, channels if per_channel else None, **options)
        )
        self.norm = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.pool(x)))
        return out

    def reduce(self, keep: Sequence[int]) -> None:
        """Replace the pooling by :meth:`MetaPool2d.reduce` of itself; the rest stays."""
        self.pool = self._meta_pool().reduce(keep)

    def to_torch(self, form: Form = FORM) -> nn.Sequential:
        """Plain ``torch.nn`` modules with the same output; norm and activation are shared.

        Raises:
            NotImplementedError: a subclass has a forward of its own and no ``to_torch``.
        """
        self._check_plain_form()
        plain = plain_form(self._meta_pool(), form)
        sequence = self._with_hooks(plain, self.norm, self.act)
        assert isinstance(sequence, nn.Sequential)
        return sequence

    def _inner(self) -> nn.Module:
        return self.pool

    def _meta_pool(self) -> MetaPool2d:
        assert isinstance(self.pool, MetaPool2d)
        return self.pool


def _without_parametrizations(module: MetaPool2d) -> MetaPool2d:
    """Another module of the same class, with the same parts and all that a subclass has added."""
    kind: type[MetaPool2d] = type_before_parametrizations(module)
    other = kind.__new__(kind)
    for name, value in vars(module).items():
        # Containers are torch's own, of parts and hooks.
        own = name.startswith("_") and isinstance(value, (dict, set))
        vars(other)[name] = copy(value) if own else value
    other._modules.pop("parametrizations", None)
    return other
