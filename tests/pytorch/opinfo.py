"""``fused_meta_pool`` described as PyTorch describes its own operators, one OpInfo a backend."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metapool_kernels import fused_meta_pool
from tests import cases, judge
from tests.backends import BACKENDS
from tests.cases import CANDIDATES, Case
from tests.pytorch import pytorch_internal

core = pytorch_internal.load("opinfo.core")
dtypes = pytorch_internal.load("common_dtype")

SAMPLES = (
    Case((2, 3, 5, 6)),
    Case((2, 3, 5, 6), layout="channels_last", alpha="ck"),
    Case((1, 3, 4, 5), candidates=CANDIDATES["rectangular"], stride=2, normalize=None),
    Case((2, 2, 4, 5), candidates=CANDIDATES["avg"], count_include_pad=False, alpha="nck"),
    Case((2, 2, 3, 7), candidates=CANDIDATES["unsorted"], alpha="n1k", normalize=None),
    Case((2, 2, 5, 4), layout="channels_last", candidates=CANDIDATES["strips"], stride=(1, 2)),
    Case((1, 1, 3, 3), candidates=CANDIDATES["with_none"]),
    Case((1, 1, 1, 1), candidates=CANDIDATES["largest"]),
    Case((0, 2, 3, 3), candidates=CANDIDATES["no_skip"]),
)
"""Small maps over layouts, strides, shapes of alpha, kinds of candidates; the first 3-D as well."""


def sample_inputs(
    op_info: Any, device: str, dtype: torch.dtype, requires_grad: bool, **_: Any
) -> Iterator[Any]:
    """Values that differ by far more than a finite difference, so that no maximum changes."""
    for case in SAMPLES:
        count = torch.Size(case.size).numel()
        x = torch.randperm(count).to(device, dtype).view(case.size) / max(count, 1) * 4 - 2
        shape = cases.ALPHA_SHAPES[case.alpha](*case.size[:2], len(case.candidates))
        alpha = torch.randn(shape, device=device).to(dtype)
        yield _sample(cases.laid_out(x, case.layout), alpha, case, requires_grad)
        if case is SAMPLES[0]:
            yield _sample(x[0], alpha, case, requires_grad)


def _sample(x: Tensor, alpha: Tensor, case: Case, requires_grad: bool) -> Any:
    leaves = [tensor.detach().requires_grad_(requires_grad) for tensor in (x, alpha)]
    return core.SampleInput(leaves[0], args=(leaves[1], case.candidates), kwargs=dict(case.options))


def error_inputs(op_info: Any, device: str, **_: Any) -> Iterator[Any]:
    """One of each class; tests/refusals/test_bad_input.py has them all."""
    x, alpha = torch.ones(2, 3, 4, 5, device=device), torch.ones(7, device=device)
    for arguments, kwargs, error, message in (
        ((x, alpha[:4]), {}, RuntimeError, "alpha should contain 7 elements not 4"),
        ((x[0, 0], alpha), {}, RuntimeError, "x should be 3-D"),
        ((x.int(), alpha), {}, NotImplementedError, "not implemented for 'int32'"),
        ((x, alpha), {"stride": 0}, ValueError, "stride should be"),
        ((x, alpha), {"stride": 1.0}, TypeError, "stride should be"),
        ((x, alpha), {"candidates": ("max_pool_2x2",)}, ValueError, "odd and from 1 to 15"),
    ):
        sample = core.SampleInput(arguments[0], args=arguments[1:], kwargs=kwargs)
        yield core.ErrorInput(sample, error_type=error, error_regex=message)


def definition(x: Tensor, alpha: Tensor, candidates: tuple[str, ...], **options: Any) -> Tensor:
    """What the op is compared with: the definition in float64, rounded once."""
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    out = judge.truth(batch, alpha, Case(candidates=candidates, **options)).to(x.dtype)
    return out if x.dim() == 4 else out.squeeze(0)


@cache
def batches_second_order() -> bool:
    """Whether PyTorch's own max_pool2d does: up to some version it refuses channels_last."""
    x = torch.randn(1, 2, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(F.max_pool2d(x, 3, 1, 1).square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(grad, x, torch.ones(2, *grad.shape), is_grads_batched=True)
    except RuntimeError as error:
        if "is_contiguous inside of vmap" not in str(error):
            raise
        return False
    return True


def _op_info(backend: str) -> Any:
    return core.OpInfo(
        "fused_meta_pool",
        variant_test_name=backend,
        op=partial(fused_meta_pool, backend=backend),
        dtypes=dtypes.floating_types_and(torch.float16, torch.bfloat16),
        supports_out=False,
        supports_forward_ad=True,
        supports_fwgrad_bwgrad=True,
        # PyTorch's own max_pool2d has no rule for it, as its OpInfo says.
        check_batched_forward_grad=backend != "reference",
        check_batched_gradgrad=backend != "reference" or batches_second_order(),
        sample_inputs_func=sample_inputs,
        error_inputs_func=error_inputs,
    )


OP_DB = [_op_info(backend) for backend in BACKENDS]
"""Autograd of every order, forward mode and batched gradients are claimed, and so are tested."""
