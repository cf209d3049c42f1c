"""Poolings and their mixtures as plain ``torch.nn`` modules, in the form that devices run fast."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor, nn

from metapool_kernels.candidates import Candidate, Kind


@dataclass(frozen=True)
class Form:
    """How poolings are written.

    A window separates into a strip along the width, then one along the height: the same bits for
    maxima and for where their gradient goes, the same to rounding for averages, for fewer elements.

    Args:
        split_max, split_avg: from how many elements on a window is two strips; None: never.
        pad_outside: whether zeros that an average counts are put around the map by a module of
            their own. Delegates of ExecuTorch take that, and no average that counts its padding.
    """

    split_max: int | None = 25
    split_avg: int | None = 25
    pad_outside: bool = True


FORM = Form()
"""What is fast in most runtimes, and in PyTorch."""


def plain_pool(
    candidate: Candidate, stride: tuple[int, int], count_include_pad: bool, form: Form = FORM
) -> nn.Module:
    """One candidate, centred at stride 1 or more: (N, C, H, W) to (N, C, H_out, W_out).

    ``nn.Identity`` for ``skip_connect``; one module of ``torch.nn`` or an ``nn.Sequential`` of them
    for poolings.
    """
    if candidate.kind is Kind.SKIP:
        return nn.Identity()
    if candidate.kind is Kind.NONE:
        return _Zeros(stride)
    split = form.split_avg if candidate.kind is Kind.AVG else form.split_max
    kh, kw = candidate.kh, candidate.kw
    if min(kh, kw) == 1 or split is None or kh * kw < split:
        strips = [((kh, kw), stride)]
    else:
        strips = [((1, kw), (1, stride[1])), ((kh, 1), (stride[0], 1))]
    pools: list[nn.Module] = []
    for window, step in strips:
        padding = (window[0] // 2, window[1] // 2)
        if candidate.kind is Kind.MAX:
            pools.append(nn.MaxPool2d(window, step, padding))
        elif form.pad_outside and count_include_pad and any(padding):
            pools += [
                nn.ZeroPad2d((padding[1], padding[1], padding[0], padding[0])),
                nn.AvgPool2d(window, step),
            ]
        else:
            pools.append(nn.AvgPool2d(window, step, padding, count_include_pad=count_include_pad))
    return pools[0] if len(pools) == 1 else nn.Sequential(*pools)


class SideBySide(nn.Module):
    """Outputs of K modules side by side, (N, K * C, H_out, W_out)."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pools = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([pool(x) for pool in self.pools], -3)


class Scaled(nn.Module):
    """The output of a module times a fixed weight of shape () or (C, 1, 1)."""

    weight: Tensor

    def __init__(self, pool: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.pool = pool
        self.register_buffer("weight", weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.weight.to(x.dtype) * self.pool(x)
        return out


class WeightedSum(nn.Module):
    """Sum of the outputs of K modules with fixed weights, shape (K,) or (C, K).

    As a chain of additions: what stacks the terms and sums over a fifth dimension, runtimes take
    slowly or not at all. Terms of ``none`` are left out unless there is no other.
    """

    __jit_unused_properties__ = ("pools", "weights")

    def __init__(self, modules: Sequence[nn.Module], weights: Tensor) -> None:
        super().__init__()
        each = weights.unbind() if weights.dim() == 1 else weights[..., None, None].unbind(1)
        terms = [Scaled(module, weight) for module, weight in zip(modules, each, strict=True)]
        counting = [term for term in terms if not isinstance(term.pool, _Zeros)]
        self.terms = nn.ModuleList(counting or terms[:1])

    @property
    def pools(self) -> list[nn.Module]:
        """What is summed, without its weights."""
        return [term.pool for term in self.terms if isinstance(term, Scaled)]

    @property
    def weights(self) -> Tensor:
        """Shape (K,) or (C, K)."""
        each = [term.weight for term in self.terms if isinstance(term, Scaled)]
        return torch.stack([weight[:, 0, 0] if weight.dim() else weight for weight in each], -1)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.terms[0](x)
        for k, term in enumerate(self.terms):  # torch.jit.script takes no slice of them here
            if k > 0:
                total = total + term(x)
        return total


class ScaleShift(nn.Module):
    """What a BatchNorm2d in eval mode computes, as one multiplication and one addition."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, value[:, None, None].to(norm.running_mean.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def freeze_norms(model: nn.Module) -> None:
    """Turn BatchNorm2d behind no convolution into :class:`ScaleShift`, in place, for eval mode.

    Behind a convolution runtimes take it into that; elsewhere, as behind a pooling, it stays
    several operators in some, and a layer of its own in others.
    """
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for k, (before, norm) in enumerate(pairwise(sequence), 1):
            behind_convolution = isinstance(before, (nn.Conv2d, nn.ConvTranspose2d))
            if not behind_convolution and _is_mere_norm(norm):
                sequence[k] = ScaleShift(norm)


def _is_mere_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Not of a subclass, as timm's with an activation, without hooks, its statistics fixed."""
    return (
        type(module) is nn.BatchNorm2d
        and module.running_mean is not None
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


class _Zeros(nn.Module):
    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[..., :: self.stride[0], :: self.stride[1]])
