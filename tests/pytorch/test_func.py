"""torch.func transforms against the definition under the same transform."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests import cases, judge
from tests.cases import Case

CASES = [
    Case((2, 3, 4, 5), torch.float64, layout, "distinct", names, alpha=alpha, **options)
    for layout in cases.NATIVE_LAYOUTS
    for alpha, names, options in [
        ("k", ("max_pool_3x3", "avg_pool_3x3", "skip_connect"), {}),
        ("nck", ("max_pool_3x3", "avg_pool_3x5"), {"stride": 2, "count_include_pad": False}),
        ("ck", ("avg_pool_3x3", "max_pool_1x3"), {"normalize": None}),
        ("n1k", ("max_pool_5x5", "none", "avg_pool_1x3"), {}),
        ("k", ("max_pool_3x3", "skip_connect", "avg_pool_3x3"), {"form": "stack"}),
        ("k", ("max_pool_3x3", "skip_connect", "avg_pool_3x3"), {"form": "normalized"}),
    ]
]

Op = Callable[[Tensor, Tensor], Tensor]


def _op(function: judge.Function, case: Case) -> Op:
    return lambda x, alpha: function(x, alpha, case)


def _loss(op: Op) -> Op:
    return lambda x, alpha: op(x, alpha).tanh().sum()


TRANSFORMS: dict[str, Callable[[Op], Callable[[Tensor, Tensor], object]]] = {
    "grad of x": lambda op: grad(_loss(op)),
    "grad of both": lambda op: grad(_loss(op), argnums=(0, 1)),
    "grad of grad": lambda op: grad(
        lambda x, alpha: grad(_loss(op))(x, alpha).square().sum(), argnums=(0, 1)
    ),
    "vjp": lambda op: lambda x, alpha: vjp(op, x, alpha)[1](op(x, alpha)),
    "jvp": lambda op: lambda x, alpha: jvp(op, (x, alpha), (x.sin(), alpha.cos())),
    "jvp of x": lambda op: lambda x, alpha: jvp(lambda x: op(x, alpha), (x,), (x.sin(),)),
    "jvp of alpha": lambda op: (
        lambda x, alpha: jvp(lambda alpha: op(x, alpha), (alpha,), (alpha.cos(),))
    ),
    "jvp of grad": lambda op: (
        lambda x, alpha: jvp(grad(_loss(op), argnums=(0, 1)), (x, alpha), (x.sin(), alpha.cos()))
    ),
    "grad of jvp": lambda op: grad(
        lambda x, alpha: jvp(op, (x, alpha), (x.sin(), alpha.cos()))[1].square().sum(),
        argnums=(0, 1),
    ),
    "jacrev": lambda op: jacrev(op, argnums=(0, 1)),
    "jacfwd": lambda op: jacfwd(op, argnums=(0, 1)),
    "hessian of alpha": lambda op: hessian(_loss(op), argnums=1),
    "hessian of x": lambda op: hessian(_loss(op)),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(backend: str, transform: str, case: Case) -> None:
    x, alpha, _ = case.tensors()
    apply = TRANSFORMS[transform]
    got = apply(_op(judge.fused(backend), case))(x, alpha)
    torch.testing.assert_close(got, apply(_op(judge.definition, case))(x, alpha))


BATCHED: dict[str, Callable[[Op], Callable[[Tensor, Tensor], object]]] = {
    "call": lambda op: op,
    "grad": lambda op: grad(_loss(op), argnums=(0, 1)),
    "grad of x": lambda op: grad(_loss(op)),
    "grad of alpha": lambda op: grad(_loss(op), argnums=1),
    "jvp": lambda op: lambda x, alpha: jvp(op, (x, alpha), (x.sin(), alpha.cos())),
    "jacrev": lambda op: jacrev(op, argnums=1),
    "grad of grad": lambda op: grad(
        lambda x, alpha: grad(_loss(op))(x, alpha).square().sum(), argnums=(0, 1)
    ),
}


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (2, -1), (4, 1)], ids=str)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
@pytest.mark.parametrize("inner", BATCHED)
def test_vmap(backend: str, inner: str, case: Case, in_dims: tuple[int | None, int | None]) -> None:
    """A batch is a loop: the mapped axis stands first, in the middle, last, or is shared."""
    x, alpha, _ = case.tensors()
    rng = torch.Generator().manual_seed(5)
    noise = (torch.rand(3, *t.shape, generator=rng, dtype=t.dtype) for t in (x, alpha))
    stacks = [t + n for t, n in zip((x, alpha), noise, strict=True)]
    arguments = [
        single if dim is None else stack.movedim(0, dim)
        for single, stack, dim in zip((x, alpha), stacks, in_dims, strict=True)
    ]
    apply = BATCHED[inner]
    got = vmap(apply(_op(judge.fused(backend), case)), in_dims)(*arguments)
    rows = [
        apply(_op(judge.definition, case))(
            *(s if d is None else b[i] for s, b, d in zip((x, alpha), stacks, in_dims, strict=True))
        )
        for i in range(3)
    ]
    torch.testing.assert_close(got, _stack(rows))


def _stack(rows: list) -> object:  # type: ignore[type-arg]
    if isinstance(rows[0], tuple):
        return tuple(_stack(list(column)) for column in zip(*rows, strict=True))
    return torch.stack(rows)


def test_nested_vmap(backend: str) -> None:
    case = CASES[0]
    function = _op(judge.fused(backend), case)
    x = torch.randn(2, 3, *case.size, dtype=torch.float64)
    alpha = torch.randn(2, 4, 3, dtype=torch.float64)
    inner = vmap(vmap(function, (None, 0)), (0, None))
    got = vmap(inner)(x, alpha)
    assert got.shape == (2, 3, 4, *case.size)
    for i, j, k in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
        torch.testing.assert_close(got[i, j, k], judge.definition(x[i, j], alpha[i, k], case))


def test_per_sample_gradients(backend: str) -> None:
    """vmap of grad over single samples (C, H, W), as in differentially private training."""
    case = Case((4, 3, 5, 6), torch.float64)
    x, alpha, _ = case.tensors()
    got = vmap(grad(_loss(_op(judge.fused(backend), case)), argnums=1), (0, None))(x, alpha)
    loss = _loss(_op(judge.definition, case))
    right = [grad(loss, argnums=1)(sample[None], alpha) for sample in x]
    torch.testing.assert_close(got, torch.stack(right))


def test_vmap_over_nothing(native: str) -> None:
    """Not on the reference: aten's own poolings lose a dimension there."""
    function = judge.fused(native)
    call = Case(candidates=("max_pool_3x3", "avg_pool_3x3"))
    x, alpha = torch.ones(0, 1, 2, 4, 4), torch.zeros(2)
    assert vmap(lambda part: function(part, alpha, call))(x).shape == x.shape
