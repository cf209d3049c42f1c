"""The registered ops, called as the dispatcher calls them."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from metapool_kernels import reference
from metapool_kernels.candidates import parse_candidates
from metapool_kernels.layout import is_channels_last, memory_format
from metapool_kernels.ops import meta_pool_bwd, meta_pool_fwd
from metapool_kernels.spec import PoolSpec, arguments_of
from tests import cases, judge
from tests.backends import COMPILED, DEVICE, SAMPLED, require
from tests.cases import Case

pytestmark = pytest.mark.usefixtures("native")

NAMES = ("max_pool_3x3", "avg_pool_3x5", "skip_connect", "none", "max_pool_1x7")
STEPPING = tuple(name for name in NAMES if name != "skip_connect")
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_channels_last", "expanded_batch")
CASES = [
    *(Case((2, 5, 6, 7), dtype, layout) for dtype in cases.DTYPES for layout in LAYOUTS),
    *(Case((2, 5, 6, 7), alpha=alpha, data="relu6") for alpha in cases.ALPHA_SHAPES),
    Case((0, 3, 4, 5)),
    Case((2, 1, 6, 7), layout="channels_last"),
    Case((2, 5, 1, 1), layout="channels_last"),
    Case((2, 5, 6, 7), stride=2, count_include_pad=False),
    Case((2, 5, 6, 7), layout="channels_last", stride=(1, 3)),
    *(Case((2, 5, 6, 7), layout=layout, candidates=NAMES, form="stack") for layout in LAYOUTS),
    Case((2, 5, 6, 7), torch.float16, stride=2, candidates=STEPPING, form="stack"),
]
STATIC_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = ("test_aot_dispatch_dynamic",)
"""Together with these all there are. The plain ops have no autograd that could be traced."""
OPCHECKED = [case for case in CASES if not SAMPLED or case.layout in cases.NATIVE_LAYOUTS]
OPS = [("", case) for case in OPCHECKED]
OPS += [("_traced", case) for case in CASES if case.layout in cases.NATIVE_LAYOUTS]
"""The plain ops, and those that a tracer sees, by the ends of their names."""
"""The backends that have ops."""
MASKS = ((True, True), (True, False), (False, True))


def _names(case: Case) -> tuple[str, ...]:
    return NAMES if case.stride == 1 else STEPPING


def _inputs(case: Case, with_values: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """x, weights in the accumulation dtype, values with strides of their own, grad_out.

    No weights where poolings stay side by side.
    """
    x, _, grad_out = case.tensors()
    rng = case.rng()
    n, c = case.size[:2]
    shape = cases.ALPHA_SHAPES[case.alpha](n, c, len(_names(case)))
    weights = torch.randn(shape, generator=rng, dtype=judge.accumulation(case.dtype))
    if case.form == "stack":
        weights = None
    values = torch.randn(case.size, generator=rng).to(case.dtype).transpose(2, 3).contiguous()
    return x, weights, values.transpose(2, 3) if with_values else None, grad_out


def _spec(case: Case, x: Tensor, backend: str = "cpu") -> PoolSpec:
    codes = tuple(candidate.code for candidate in parse_candidates(_names(case)))
    steps = case.stride if isinstance(case.stride, tuple) else (case.stride, case.stride)
    return PoolSpec(codes, steps, case.count_include_pad, is_channels_last(x), backend)


def _truth(
    case: Case, x: Tensor, weights: Tensor | None, values: Tensor | None, spec: PoolSpec
) -> Tensor:
    """sum_k w_k P_k(values), or all P_k(values), maxima picked by x: the derivative of the
    definition along values."""
    parsed = parse_candidates(_names(case))
    windows = spec.stride, spec.count_include_pad

    def pooled(x: Tensor) -> Tensor:
        if weights is None:
            return torch.cat([reference.pool(x, each, *windows) for each in parsed], 1)
        return reference.mix(x, weights.double(), parsed, *windows)

    wide = x.double().contiguous()
    if values is None:
        return pooled(wide)
    out: Tensor = jvp(pooled, (wide,), (values.double().contiguous(),))[1]
    return out


def _on_device(tensor: Any) -> Any:
    """Where the op runs, with the same strides."""
    if tensor is None or DEVICE == "cpu":
        return tensor
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    if 0 not in tensor.stride():
        return there.copy_(tensor)
    return tensor[:1].to(DEVICE).expand_as(tensor)


def _strides(shape: torch.Size, spec: PoolSpec) -> tuple[int, ...]:
    return torch.empty(shape, memory_format=memory_format(spec.channels_last)).stride()


def _close(got: Tensor, right: Tensor, terms: int = 0) -> None:
    """Twice the rounding of the dtype, and eight units of the accumulation.

    In float64 half a unit more for each of ``terms`` that are added up: the truth is no more exact.
    """
    assert got.shape == right.shape
    scale = max(right.abs().max().item(), 1.0) if right.numel() else 1.0
    unit = 2 * torch.finfo(got.dtype).eps + 8 * torch.finfo(judge.accumulation(got.dtype)).eps
    if got.dtype is torch.float64:
        unit += terms / 2 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(got.double(), right.double(), rtol=0, atol=unit * scale)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("with_values", [False, True], ids=["x", "values"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_forward_op(name: str, case: Case, with_values: bool) -> None:
    x, weights, values, _ = _inputs(case, with_values)
    spec = _spec(case, x, require(name))
    there = _on_device(x), _on_device(weights), _on_device(values)
    out = meta_pool_fwd(*there, spec).cpu()
    right = _truth(case, x, weights, values, spec)
    assert out.dtype is x.dtype
    assert out.stride() == _strides(right.shape, spec)
    _close(out, right)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("with_values", [False, True], ids=["x", "values"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_backward_op(name: str, case: Case, with_values: bool, mask: tuple[bool, bool]) -> None:
    x, weights, values, grad_out = _inputs(case, with_values)
    spec = _spec(case, x, require(name))
    there = _on_device(grad_out), _on_device(x), _on_device(weights), _on_device(values)
    grad_values, grad_weights = (grad.cpu() for grad in meta_pool_bwd(*there, spec, mask))
    of = (x if values is None else values).double().requires_grad_()
    w = None if weights is None else weights.double().requires_grad_()
    out = _truth(case, of if values is None else x, w, None if values is None else of, spec)
    leaves = (of,) if w is None else (of, w)
    right = torch.autograd.grad(out, leaves, grad_out.double(), materialize_grads=True)
    if mask[0]:
        assert grad_values.dtype is x.dtype
        assert grad_values.stride() == _strides(x.shape, spec)
        _close(grad_values, right[0])
    else:
        assert grad_values.shape == (0,) and grad_values.dtype is x.dtype
    if weights is None:
        assert grad_weights.shape == (0,)
    elif mask[1]:
        assert grad_weights.dtype is weights.dtype
        assert grad_weights.is_contiguous()
        _close(grad_weights, right[1], grad_out.numel())
    else:
        assert grad_weights.shape == (0,) and grad_weights.dtype is weights.dtype


@pytest.mark.parametrize("name", COMPILED)
def test_values_in_the_memory_of_x(name: str) -> None:
    """They begin at one address, and are another map all the same."""
    x, weights, _, grad_out = map(_on_device, _inputs(Case((2, 5, 6, 6)), False))
    spec = _spec(Case(), x, require(name))
    values = x.transpose(2, 3)
    ours, right = (
        (
            meta_pool_fwd(x, weights, of, spec),
            *meta_pool_bwd(grad_out, x, weights, of, spec, (True, True)),
        )
        for of in (values, values.contiguous())
    )
    assert all(map(torch.equal, ours, right))
    assert not torch.equal(ours[0], meta_pool_fwd(x, weights, None, spec))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("with_values", [False, True], ids=["x", "values"])
@pytest.mark.parametrize("suffix, case", OPS, ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_opcheck_forward(
    name: str, suffix: str, case: Case, with_values: bool, requires_grad: bool
) -> None:
    x, weights, values, _ = map(_on_device, _inputs(case, with_values))
    _need_grad(requires_grad, x, weights, values)
    op, _ = _ops(require(name), suffix)
    arguments = (x, weights, values, *arguments_of(_spec(case, x)))
    torch.library.opcheck(op, arguments, test_utils=STATIC_CHECKS)
    if suffix or not requires_grad:
        torch.library.opcheck(op, arguments, test_utils=TRACED)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("suffix, case", OPS, ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_opcheck_backward(name: str, suffix: str, case: Case, requires_grad: bool) -> None:
    _, op = _ops(require(name), suffix)
    for with_values, mask in itertools.product((False, True), MASKS):
        x, weights, values, grad_out = map(_on_device, _inputs(case, with_values))
        _need_grad(requires_grad, grad_out, x, weights, values)
        arguments = (grad_out, x, weights, values, *arguments_of(_spec(case, x)), mask)
        torch.library.opcheck(op, arguments, test_utils=STATIC_CHECKS)
        if mask == (True, True) and (suffix or not requires_grad):
            torch.library.opcheck(op, arguments, test_utils=TRACED)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_opcheck_for_normalising(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    case = Case((2, 5, 6, 7), dtype, "channels_last" if channels_last else "contiguous")
    terms = [torch.randn(5, len(NAMES), dtype=judge.accumulation(dtype)) for _ in range(3)]
    x, _, grad_out, *terms = map(_on_device, (*case.tensors(), *terms))
    arguments = arguments_of(_spec(case, x))
    ops, prefix = torch.ops.metapool_kernels, "" if require(name) == "cpu" else f"{name}_"
    calls: dict[str, tuple[Tensor, ...]] = {
        "moments": (x,),
        "products": (grad_out, x, terms[0]),
        "affine_fwd": (x, terms[0], terms[1][:, :1]),
        "affine_bwd": (grad_out, x, *terms, terms[0]),
    }
    if name != "cpu":
        del calls["affine_bwd"]
    for function, tensors in calls.items():
        op = getattr(ops, f"{prefix}meta_pool_{function}").default
        torch.library.opcheck(op, (*tensors, *arguments), test_utils=(*STATIC_CHECKS, *TRACED))
        for k, tensor in enumerate(tensors):  # one too few of something, each in turn
            if tensor is not x:
                wrong = [*tensors[:k], tensor[1:], *tensors[k + 1 :]]
                with pytest.raises(RuntimeError, match="meta_pool: "):
                    op(*wrong, *arguments)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.every
def test_opcheck_with_values(name: str) -> None:
    """Where only a share of the tests runs, this one does."""
    test_opcheck_forward(name, "", CASES[0], True, False)
    test_opcheck_backward(name, "", CASES[0], False)


def _ops(name: str, suffix: str = "") -> tuple[Any, Any]:
    ops, prefix = torch.ops.metapool_kernels, "" if name == "cpu" else f"{name}_"
    fwd, bwd = (getattr(ops, f"{prefix}meta_pool_{pass_}{suffix}") for pass_ in ("fwd", "bwd"))
    return fwd.default, bwd.default


@pytest.mark.parametrize("name", dict.fromkeys((*COMPILED, "triton")))
@pytest.mark.every
def test_ops_refuse_what_they_would_read_beyond(name: str) -> None:
    case = CASES[0]
    x, weights, values, grad_out = map(_on_device, _inputs(case, True))
    arguments = arguments_of(_spec(case, x))
    if name in COMPILED:
        require(name)
    forward, backward = _ops(name)
    with pytest.raises(RuntimeError, match="x should be 4-D"):
        forward(x[0], weights, None, *arguments)
    with pytest.raises(RuntimeError, match="weights should have shape"):
        forward(x, weights[..., 1:], None, *arguments)
    n, c, k = *x.shape[:2], len(weights)
    for shape in ((c + 1, k), (n + 1, 1, k), (n + 1, c, k), (n, c + 1, k), (1, n, c, k)):
        with pytest.raises(RuntimeError, match="weights should have shape"):
            forward(x, weights.expand(shape).contiguous(), None, *arguments)
    if name in COMPILED and name != "triton":  # which reads weights of any dtype as what they are
        with pytest.raises(RuntimeError, match="weights should have the accumulation dtype"):
            forward(x, weights.half(), None, *arguments)
    with pytest.raises(RuntimeError, match="a map has the wrong shape"):
        forward(x, weights, values[..., 1:], *arguments)
    with pytest.raises(RuntimeError, match="a map has the wrong shape"):
        backward(grad_out[..., 1:, :], x, weights, None, *arguments, (True, True))
    with pytest.raises(RuntimeError, match="maps should share one dtype"):
        backward(grad_out.to(torch.float16), x, weights, None, *arguments, (True, True))


def _need_grad(wanted: bool, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_(wanted)
