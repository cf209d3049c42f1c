"""What decides whether a result is right.

The truth is the definition, :mod:`metapool_kernels.reference`, in float64. An error is measured
against it and may not exceed the error that eager PyTorch makes in the dtype of ``x``; NaN and
infinities have to be where the truth has them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metapool_kernels import (
    fused_meta_pool,
    fused_multi_pool,
    fused_normalized_meta_pool,
    reference,
)
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.checks import check_stride
from metapool_kernels.layout import is_channels_last, memory_format
from tests.backends import DEVICE
from tests.cases import Case

Function = Callable[[Tensor, Tensor, Case], Tensor]
Results = dict[str, Tensor]

ALL = ("out", "grad_x", "grad_alpha")


def op(x: Tensor, alpha: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """:func:`fused_meta_pool` of tensors on the CPU, on the device that the tests are run for."""
    return fused_meta_pool(x.to(DEVICE), alpha.to(DEVICE), *arguments, **options).to("cpu")


def fused(backend: str) -> Function:
    """The op on one backend, of tensors on the CPU, in the form of each case."""

    def function(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
        if case.form == "stack":
            there = x.to(DEVICE)
            return fused_multi_pool(there, case.candidates, backend=backend, **case.options).to(
                "cpu"
            )
        if case.form == "normalized":
            out = fused_normalized_meta_pool(
                x.to(DEVICE),
                alpha.to(DEVICE),
                case.candidates,
                training=True,
                backend=backend,
                **case.options,
            )
            return out.to("cpu")
        return op(x, alpha, case.candidates, backend=backend, **case.options)

    return function


def definition(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    """The definition, every step in the dtype of its arguments."""
    parsed = parse_candidates(case.candidates)
    steps = check_stride(case.stride)
    if case.form == "stack":
        pools = (reference.pool(x, each, steps, case.count_include_pad) for each in parsed)
        return torch.cat(list(pools), 1)
    weights = torch.softmax(alpha, -1) if case.normalize == "softmax" else alpha
    if case.form == "normalized":
        return _normalized_mix(x, weights, case)
    return reference.mix(x, weights, parsed, steps, case.count_include_pad)


def _normalized_mix(x: Tensor, weights: Tensor, case: Case) -> Tensor:
    """The mixed operation of DARTS, where a BatchNorm follows each pooling."""
    total = torch.zeros(())
    for weight, name in zip(weights[..., None, None].unbind(-3), case.candidates, strict=True):
        candidate = parse_candidates((name,))[0]
        pooled = reference.pool(x, candidate, check_stride(case.stride), case.count_include_pad)
        if "_pool_" in name and x.dtype is torch.float64:
            # F.batch_norm has no third order, and a wrong gradient of forward mode (torch 2.14).
            deviations = pooled - pooled.mean((0, 2, 3), keepdim=True)
            variance = deviations.square().mean((0, 2, 3), keepdim=True)
            pooled = deviations * (variance + 1e-5).rsqrt()
        elif "_pool_" in name:
            pooled = F.batch_norm(pooled, None, None, training=True)
        total = total + weight * pooled
    return total


def truth(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    """The definition in float64."""
    return definition(x.double().contiguous(), alpha.double(), case)


def eager(x: Tensor, alpha: Tensor, case: Case) -> Tensor:
    """What a user of plain PyTorch gets in the dtype of ``x``."""
    return definition(x, alpha.to(x.dtype), case)


def results(
    function: Function, case: Case, wants: tuple[str, ...] = ALL, grad_out: Tensor | None = None
) -> Results:
    """Run a function on a case: its output and the gradients that are asked for."""
    x, alpha, drawn = case.tensors()
    return run(function, case, x, alpha, drawn if grad_out is None else grad_out, wants)


def run(
    function: Function,
    case: Case,
    x: Tensor,
    alpha: Tensor,
    grad_out: Tensor,
    wants: tuple[str, ...] = ALL,
) -> Results:
    """:func:`results` on given tensors."""
    leaves = {"grad_x": x.detach(), "grad_alpha": alpha.detach()}
    wanted = [leaf.requires_grad_() for name, leaf in leaves.items() if name in wants]
    out = function(leaves["grad_x"], leaves["grad_alpha"], case)
    found = {"out": out.detach()}
    if wanted:
        grads: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if out.requires_grad:  # zeros of "none" alone do not, in eager PyTorch
            grads = torch.autograd.grad(out, wanted, grad_out.to(out.dtype), allow_unused=True)
        names = (name for name in leaves if name in wants)
        found |= {
            name: torch.zeros_like(leaf) if grad is None else grad
            for name, leaf, grad in zip(names, wanted, grads, strict=True)
        }
    return found


def right_results(
    case: Case, x: Tensor, alpha: Tensor, grad_out: Tensor, wants: tuple[str, ...] = ALL
) -> Results:
    """The truth of given tensors, all of it in float64.

    Gradients take the dtype of their leaf: in half precision they would be rounded here, and a sum
    in the middle between two of its numbers would count as one of them.
    """
    return run(truth, case, x.double(), alpha.double(), grad_out.double(), wants)


def judge(function: Function, case: Case, wants: tuple[str, ...] = ALL) -> None:
    """Fail unless the function's results on the case are right."""
    x, alpha, grad_out = case.tensors()
    kept = [tensor.clone() for tensor in (x, alpha, grad_out)]
    got = run(function, case, x, alpha, grad_out, wants)
    for tensor, before in zip((x, alpha, grad_out), kept, strict=True):
        assert torch.equal(bits(tensor), bits(before)), "an input was changed"
    verdict(got, case, x, alpha, grad_out)


def verdict(got: Results, case: Case, x: Tensor, alpha: Tensor, grad_out: Tensor) -> None:
    """Fail unless given results are right: dtype, shape, strides of the output, values."""
    wants = tuple(got)
    right = right_results(case, x, alpha, grad_out, wants)
    plain = run(eager, case, x, alpha, grad_out, wants)
    sizes = magnitudes(case, x, alpha, grad_out, wants)
    dtypes = {"out": x.dtype, "grad_x": x.dtype, "grad_alpha": alpha.dtype}
    if "out" in got:
        assert got["out"].stride() == out_strides(x, got["out"], case), "strides of out"
    for name, result in got.items():
        assert result.dtype is dtypes[name], f"{name} has dtype {result.dtype}"
        wide = accumulation(x.dtype)
        count = terms(case, name)
        compare(name, result, right[name], plain[name], sizes[name], count, wide)


def compare(
    name: str,
    got: Tensor,
    right: Tensor,
    plain: Tensor,
    size: float,
    count: int,
    accumulate: torch.dtype,
) -> None:
    """Fail unless the error of ``got`` is at most that of ``plain``, eager PyTorch.

    ``size`` is the largest sum of the magnitudes of all terms of one element, ``count`` comes from
    :func:`terms`. The allowance on top of the eager error:

    - float32: the same again, and one rounding unit. Ours and eager PyTorch's errors are those of
      different orders of the same additions, so either may be the larger one.
    - float64: half a rounding unit for each of ``count`` additions. The truth is no more exact
      than that, a float64 sum itself. What right kernels are seen to need of maps is a fifth of it.
    - float16 and bfloat16: eight rounding units of float32. Ours is the sum in float32, rounded
      once; no value of the dtype is nearer to the truth by more than the error of that sum.
    """
    assert got.shape == right.shape, f"{name} has shape {list(got.shape)}, not {list(right.shape)}"
    expected = right.to(got.dtype)
    overflowed = expected.isfinite() & ~plain.isfinite()  # beyond what eager PyTorch can do
    for kind, test in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        differs = (test(got) != test(expected)) & ~overflowed
        assert not differs.any(), f"{name}: {kind} differs first at {differs.nonzero()[0].tolist()}"
    finite = expected.isfinite() & plain.isfinite()
    if not finite.any():
        return
    ours, theirs = ((values.double() - right).abs().where(finite, 0.0) for values in (got, plain))
    limits = torch.finfo(accumulate)
    unit = max(limits.eps * size, limits.eps * limits.smallest_normal)
    allowances = {torch.float32: (2, 1), torch.float64: (1, count / 2)}
    times, units = allowances.get(plain.dtype, (1, 8))
    bound = times * theirs.max().item() + units * unit
    worst = ours.max().item()
    where = (ours == worst).nonzero()[0].tolist()
    assert worst <= bound, (
        f"{name}: error {worst:.3g} at {where} of {list(got.shape)} is above {bound:.3g} "
        f"(eager PyTorch: {theirs.max().item():.3g}, rounding unit: {unit:.3g}); "
        f"got {got[tuple(where)].item()!r}, truth {right[tuple(where)].item()!r}"
    )


def magnitudes(
    case: Case, x: Tensor, alpha: Tensor, grad_out: Tensor, wants: tuple[str, ...]
) -> Mapping[str, float]:
    """For each result the largest sum of magnitudes of the terms of one element."""
    weights = torch.softmax(alpha.double(), -1) if case.normalize == "softmax" else alpha.double()
    times = 1
    if case.form == "normalized":  # three terms each, that of the mixture and two of the moments
        case, weights, times = replace(case, form="mix"), weights * _scales(x, case), 3
    finite_x = x.double().nan_to_num(0.0, 0.0, 0.0)
    raw = replace(case, normalize=None)
    sums = run(truth, raw, finite_x.abs(), weights.abs(), grad_out.double().abs(), ALL)
    sums["grad_x"] = run(
        truth, raw, x.double(), weights.abs(), grad_out.double().abs(), ("grad_x",)
    )["grad_x"]
    return {name: times * sums[name].max().item() if sums[name].numel() else 0.0 for name in wants}


def _scales(x: Tensor, case: Case) -> Tensor:
    """What poolings are multiplied by where they are normalised, (C, K); of finite numbers."""
    scales = []
    for name in case.candidates:
        candidate = parse_candidates((name,))[0]
        finite = x.double().nan_to_num(0.0, 0.0, 0.0)
        pooled = reference.pool(
            finite, candidate, check_stride(case.stride), case.count_include_pad
        )
        variance = (
            pooled.var((0, 2, 3), correction=0) if pooled.numel() else x.new_zeros(x.shape[1])
        )
        scale = (variance.double() + 1e-5).rsqrt()
        scales.append(scale if "_pool_" in name else torch.ones_like(scale))
    return torch.stack(scales, -1)


def terms(case: Case, name: str) -> int:
    """How many numbers are added up, one after the other, for one element of a result.

    Those of a window and of all candidates; for the gradient of alpha, a sum over the whole map,
    sixteen more, which PyTorch's sum, the truth's, puts into one chain.
    """
    parsed = parse_candidates(case.candidates)
    window = max(candidate.kh * candidate.kw for candidate in parsed)
    return window + len(parsed) + (16 if name == "grad_alpha" else 0)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the op adds up."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def aten_strides(x: Tensor, stride: int | tuple[int, int] = 1) -> tuple[int, ...]:
    """Strides of what aten's pooling returns for ``x``."""
    return F.avg_pool2d(x.detach(), 1, stride).stride()


def out_strides(x: Tensor, out: Tensor, case: Case) -> tuple[int, ...]:
    """Strides that the output for ``x`` has to have: those of its own shape, in its layout."""
    if case.form == "mix":
        return aten_strides(x, case.stride)
    return torch.empty(out.shape, memory_format=memory_format(is_channels_last(x))).stride()


def bits(tensor: Tensor) -> Tensor:
    """The bits as integers, so that NaN equals itself and 0.0 differs from -0.0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers)
