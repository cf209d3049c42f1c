"""torch.compile and torch.export: no graph break, no recompilation per shape, the same result."""

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from metapool_kernels import MetaPool2d, SpatialEnhancer, fused_meta_pool
from tests import cases, judge
from tests.cases import CANDIDATES, Case

CASES = [
    Case(),
    Case(layout="channels_last", alpha="nck"),
    Case(dtype=torch.bfloat16, alpha_dtype=torch.float32),
    Case(layout="sliced", candidates=CANDIDATES["no_skip"], stride=2, normalize=None),
    Case(candidates=CANDIDATES["strips"], count_include_pad=False, alpha="ck"),
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


def test_inductor(native: str) -> None:
    """With neighbours to fuse, whose layout the compiler may choose."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), SpatialEnhancer(8, backend=native)
    )
    x = torch.randn(2, 3, 9, 11)

    def step(module: torch.nn.Module) -> list[Tensor]:
        module.zero_grad()
        out = module(x)
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in network.parameters())]  # type: ignore[union-attr]

    expected = step(network)
    got = step(torch.compile(network, fullgraph=True))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SIZES = [(2, 4, 9, 11), (3, 4, 8, 7), (5, 4, 20, 6), (2, 4, 30, 31), (7, 4, 5, 5)]


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_shapes_do_not_recompile(backend: str, dynamic: bool | None, layout: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    module = MetaPool2d(backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)
    for size in SIZES:
        x, _, grad_out = Case(size, layout=layout).tensors()
        x.requires_grad_()
        out = compiled(x)
        (grad,) = torch.autograd.grad(out, x, grad_out)
        expected = module(x)
        torch.testing.assert_close(out, expected)
        assert out.stride() == expected.stride()
        torch.testing.assert_close(grad, torch.autograd.grad(expected, x, grad_out)[0])
    # the first shape may be taken for the only one; then one graph serves all
    assert counter.frame_count <= (1 if dynamic else 2)


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


def test_the_graph_holds_the_fused_op(native: str) -> None:
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    module = torch.compile(
        MetaPool2d(backend=native),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(spy(graph, inputs))),
    )
    module(torch.randn(1, 3, 6, 6, requires_grad=True)).sum().backward()
    assert sum("meta_pool_fwd" in name for name in seen) == 1
    assert sum("meta_pool_bwd" in name for name in seen) == 1
    assert not [name for name in seen if "max_pool" in name or "avg_pool" in name]


@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_export_round_trip(backend: str, layout: str) -> None:
    module = SpatialEnhancer(4, backend=backend).eval()
    x, _, _ = Case((2, 4, 9, 11), layout=layout).tensors()
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in "nhw")
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: batch, 2: height, 3: width},), strict=False
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in SIZES:
        x, _, _ = Case(size, layout=layout).tensors()
        torch.testing.assert_close(loaded(x), module(x))


def test_export_strict(backend: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    module = MetaPool2d(backend=backend)
    program = torch.export.export(module, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), module(x))


def test_errors_are_those_of_eager(backend: str) -> None:
    compiled = torch.compile(fused_meta_pool, backend="aot_eager")
    with pytest.raises(RuntimeError, match="alpha should contain 7 elements not 4"):
        compiled(torch.ones(1, 2, 3, 3), torch.ones(4), backend=backend)
