"""torch.compile: no graph break, no recompilation per shape, the same result to the stride."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap

from metapool_kernels import MetaPool2d, SpatialEnhancer
from tests import cases, judge
from tests.backends import needs_compiler
from tests.cases import CANDIDATES, SHAPES, Case
from tests.pytorch.test_func import BATCHED, TRANSFORMS, Op

CASES = [
    Case(),
    Case(layout="channels_last", alpha="nck"),
    Case(dtype=torch.bfloat16, alpha_dtype=torch.float32),
    Case(layout="sliced", candidates=CANDIDATES["no_skip"], stride=2, normalize=None),
    Case(candidates=CANDIDATES["strips"], count_include_pad=False, alpha="ck"),
    Case(candidates=CANDIDATES["pyramid"], form="stack"),
    Case(form="normalized"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _same(got: judge.Results, expected: judge.Results) -> None:
    for name, tensor in expected.items():
        assert got[name].dtype is tensor.dtype and got[name].stride() == tensor.stride()
        torch.testing.assert_close(got[name], tensor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_equals_eager(backend: str, case: Case) -> None:
    function = judge.fused(backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, alpha, grad_out = case.tensors()
    expected = judge.run(function, case, x, alpha, grad_out)
    _same(judge.run(compiled, case, x, alpha, grad_out), expected)


@pytest.mark.parametrize("needs", ["grad_x", "grad_alpha"])
def test_compiled_with_one_gradient(backend: str, needs: str) -> None:
    function = judge.fused(backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, alpha, grad_out = Case().tensors()
    expected = judge.run(function, Case(), x, alpha, grad_out, (needs,))
    x, alpha, grad_out = Case().tensors()
    _same(judge.run(compiled, Case(), x, alpha, grad_out, (needs,)), expected)


STRIDED = [
    *(Case(layout=layout, stride=1) for layout in cases.LAYOUTS),
    *(
        Case(size=SHAPES[size][0], layout=layout)
        for size in ("gray", "pixels", "one", "row", "column", "no_batch")
        for layout in cases.NATIVE_LAYOUTS
    ),
]


@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strides_are_those_of_eager(native: str, case: Case) -> None:
    """Also of gradients, and where one channel or one pixel leave the layout ambiguous.

    Not on the reference, whose clone() loses the strides of axes of one element in a trace.
    """
    function = judge.fused(native)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, alpha, grad_out = case.tensors()
    expected = judge.run(function, case, x, alpha, grad_out)
    got = judge.run(compiled, case, x, alpha, grad_out)
    _same(got, expected)
    assert got["out"].stride() == judge.aten_strides(x)


@needs_compiler
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_inductor(native: str, layout: str) -> None:
    """With neighbours to fuse, whose layout the compiler may choose."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        SpatialEnhancer(8, backend=native),
        torch.nn.Conv2d(8, 4, 1),
    )
    x = cases.LAYOUTS[layout](torch.randn(2, 3, 9, 11)).requires_grad_()
    if layout == "channels_last":
        network.to(memory_format=torch.channels_last)

    def step(module: torch.nn.Module) -> list[Tensor]:
        module.zero_grad()
        out = module(x)
        wanted = [x, *network.parameters()]
        return [out.detach(), *torch.autograd.grad(out.square().mean(), wanted)]

    expected = step(network)
    got = step(torch.compile(network, fullgraph=True))
    assert got[0].stride() == expected[0].stride()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Graphs:
    """A compiler that runs graphs as they are and counts them, forward and backward."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []

    def compile(self, function: Callable[..., Tensor], dynamic: bool | None = None) -> Any:
        compiler = aot_autograd(
            fw_compiler=lambda graph, _: self._note(self.forward, graph),
            bw_compiler=lambda graph, _: self._note(self.backward, graph),
        )
        return torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)

    @staticmethod
    def _note(graphs: list[torch.fx.GraphModule], graph: torch.fx.GraphModule) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.forward), len(self.backward)


SIZES = [
    (2, 4, 9, 11), (3, 4, 8, 7), (5, 4, 20, 6), (2, 4, 30, 31), (7, 4, 5, 5),
    (4, 4, 2, 40), (6, 4, 40, 3), (3, 4, 2, 2), (8, 4, 6, 9), (2, 4, 17, 33),
]  # fmt: skip
"""Ten shapes: N, H and W vary, alone and together; some are lower or narrower than a window."""

WITH_ONES = [
    (1, 4, 9, 11), (1, 4, 5, 6), (2, 4, 1, 9), (5, 4, 1, 7), (2, 4, 9, 1), (3, 4, 8, 1),
    (1, 4, 1, 1), (2, 4, 9, 11), (1, 4, 7, 8), (4, 4, 1, 30), (4, 4, 1, 1), (3, 4, 1, 1),
]  # fmt: skip
"""Batches of one, maps of one row or one column, and some that are not."""


def _train(
    compiled: Callable[[Tensor], Tensor], module: MetaPool2d, size: cases.Size, layout: str
) -> None:
    """A forward and a backward of both, which must give the same."""
    x, _, grad_out = Case(size, layout=layout).tensors()
    wanted = (x.requires_grad_(), module.alpha)
    out, expected = compiled(x), module(x)
    torch.testing.assert_close(out, expected)
    assert 1 in size or out.stride() == expected.stride()
    grads = torch.autograd.grad(out, wanted, grad_out)
    for a, b in zip(grads, torch.autograd.grad(expected, wanted, grad_out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.many_calls
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_ten_shapes_cost_one_recompile_at_most(
    backend: str, dynamic: bool | None, layout: str
) -> None:
    """The first shape may be taken for the only one; the graph of the second serves all others."""
    graphs, module = Graphs(), MetaPool2d(backend=backend)
    compiled = graphs.compile(module, dynamic)
    for size in SIZES:
        _train(compiled, module, size, layout)
    assert graphs.counts == ((1, 1) if dynamic else (2, 2))


def test_a_size_of_one_costs_a_graph_once(backend: str) -> None:
    """torch.compile takes a size of 1 for a constant, whatever it compiles.

    So "one recompile" above is of sizes over 1; beyond that each set of axes with one element has
    one graph, for all sizes of the other axes.
    """
    graphs, module = Graphs(), MetaPool2d(backend=backend)
    compiled = graphs.compile(module, dynamic=True)
    seen = set()
    for size in WITH_ONES:
        _train(compiled, module, size, "contiguous")
        seen.add(tuple(side == 1 for side in size))
        assert graphs.counts == (len(seen), len(seen))
    assert len(seen) == 6


def test_alpha_step_does_not_recompile(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    module = MetaPool2d(backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_graph_of_inference_holds_the_fused_op(
    native: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    """And not what stands for it while it is traced, which would go through Python."""
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    module = torch.compile(
        MetaPool2d(backend=native),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=spy, inference_compiler=spy),
    )
    with mode():
        module(torch.randn(1, 3, 6, 6))
    assert [name for name in seen if "meta_pool" in name] == [
        "metapool_kernels.meta_pool_fwd.default"
    ]


def test_the_graph_holds_the_fused_op(native: str) -> None:
    graphs = Graphs()
    compiled = graphs.compile(MetaPool2d(backend=native))
    compiled(torch.randn(1, 3, 6, 6, requires_grad=True)).sum().backward()
    names = [
        str(node.target)
        for graph in graphs.forward + graphs.backward
        for node in graph.graph.nodes
        if node.op == "call_function"
    ]
    ours = [name for name in names if "meta_pool" in name]
    assert ours == [
        "metapool_kernels.meta_pool_fwd.default",
        "metapool_kernels.meta_pool_bwd.default",
    ]
    assert not [name for name in names if "max_pool" in name or "avg_pool" in name]


def _second_order(call: Callable[[Tensor], Tensor], module: MetaPool2d) -> tuple[Tensor, ...]:
    x, _, _ = Case((2, 3, 5, 6), torch.float64).tensors()
    x.requires_grad_()
    (first,) = torch.autograd.grad(call(x).tanh().sum(), x, create_graph=True)
    # Times alpha, so that a gradient that had lost its history would still give some result.
    return torch.autograd.grad((first * module.alpha[0]).square().sum(), (x, module.alpha))


def test_double_backward_of_a_graph_that_runs_as_it_was_traced(backend: str) -> None:
    module = MetaPool2d(backend=backend, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(_second_order(compiled, module), _second_order(module, module))


def test_double_backward_of_a_lowered_graph_is_refused_by_torch(backend: str) -> None:
    """No compiler of torch's has second derivatives; the answer is its own, and not a number."""
    module = MetaPool2d(backend=backend, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        _second_order(compiled, module)


CASE = Case((2, 3, 4, 5), torch.float64, data="distinct", candidates=CANDIDATES["rectangular"])


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def _torch_compiles(transform: str) -> bool:
    """Whether torch.compile takes a transform at all, here of a product; not all versions do."""
    x, alpha, _ = CASE.tensors()
    try:
        _compiled(TRANSFORMS[transform](lambda x, alpha: x * alpha.mean()))(x, alpha)
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_inside_of_what_is_compiled(backend: str, transform: str) -> None:
    x, alpha, _ = CASE.tensors()
    function, apply = judge.fused(backend), TRANSFORMS[transform]
    try:
        got = _compiled(apply(lambda x, alpha: function(x, alpha, CASE)))(x, alpha)
    except torch._dynamo.exc.Unsupported:
        if _torch_compiles(transform):
            raise
        pytest.skip(f"torch {torch.__version__} compiles no {transform} of any function")
    right = apply(lambda x, alpha: judge.definition(x, alpha, CASE))(x, alpha)
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("inner", BATCHED)
def test_vmap_inside_of_what_is_compiled(backend: str, inner: str) -> None:
    x, alpha, _ = CASE.tensors()
    batch = torch.stack([alpha, alpha.sin(), -alpha])
    function, apply = judge.fused(backend), BATCHED[inner]

    def mapped(op: Op) -> Callable[..., object]:
        return vmap(apply(op), (None, 0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a slow way that torch has to take
        got = _compiled(mapped(lambda x, alpha: function(x, alpha, CASE)))(x, batch)
    torch.testing.assert_close(got, mapped(lambda x, a: judge.definition(x, a, CASE))(x, batch))


OUTSIDE: dict[str, Callable[[Op], Op]] = {
    "grad": lambda op: grad(lambda x, alpha: op(x, alpha).tanh().sum()),
    "jvp": lambda op: lambda x, alpha: jvp(op, (x, alpha), (x.sin(), alpha.cos()))[1],
    "vmap": lambda op: lambda x, alpha: vmap(op, (None, 0))(x, torch.stack([alpha, -alpha])),
}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", OUTSIDE)
def test_transforms_of_what_is_compiled(backend: str, transform: str, compiler: str) -> None:
    function, apply = judge.fused(backend), OUTSIDE[transform]
    case = replace(CASE, candidates=CANDIDATES["no_skip"])
    x, alpha, _ = case.tensors()
    compiled = torch.compile(function, backend=compiler)
    got = apply(lambda x, alpha: compiled(x, alpha, case))(x, alpha)
    torch.testing.assert_close(got, apply(lambda x, a: judge.definition(x, a, case))(x, alpha))
