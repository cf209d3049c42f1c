"""Tensors that are not what their memory says: the right result, or a refusal in plain words."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from metapool_kernels import MetaPool2d, SpatialEnhancer, fused_meta_pool
from tests import cases, judge
from tests.cases import Case

NAMES = ("skip_connect", "max_pool_3x3", "avg_pool_3x3")
CASE = Case((2, 5, 4, 6), candidates=NAMES)


class Tagged(Tensor):
    """A subclass that changes nothing."""


def _no_grad_there(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(make)


def _in_a_bytearray(t: Tensor) -> Tensor:
    owner = bytearray(t.untyped_storage().tolist())
    return torch.frombuffer(owner, dtype=t.dtype).view(t.shape)


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda t: torch._neg_view(-t),
    "real part": lambda t: torch.complex(t, t).real,
    "imaginary part of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "subclass": lambda t: t.as_subclass(Tagged),
    "parameter": torch.nn.Parameter,
    "made in inference mode": _no_grad_there(lambda t: t.clone()),
    "shared memory": lambda t: t.clone().share_memory_(),
    "of another owner": _in_a_bytearray,
}
"""Ways to say the same numbers."""


@pytest.mark.parametrize("which", ["x", "alpha", "both"])
@pytest.mark.parametrize("how", SAME)
def test_the_numbers_count(backend: str, how: str, which: str) -> None:
    x, alpha, _ = CASE.tensors()
    odd_x = SAME[how](x) if which != "alpha" else x
    odd_alpha = SAME[how](alpha) if which != "x" else alpha
    with torch.no_grad():  # a parameter would ask for a graph, others cannot have one
        got = fused_meta_pool(odd_x, odd_alpha, NAMES, backend=backend)
        expected = fused_meta_pool(x, alpha, NAMES, backend=backend)
    assert torch.equal(torch.as_tensor(got).as_subclass(Tensor), expected)


@pytest.mark.parametrize("how", ["negated", "real part", "imaginary part of a conjugate"])
def test_gradients_pass_to_what_was_negated(backend: str, how: str) -> None:
    x, alpha, grad_out = CASE.tensors()

    def gradients(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), alpha.clone().requires_grad_()
        out = fused_meta_pool(*map(change, leaves), NAMES, backend=backend)
        return torch.autograd.grad(out, leaves, torch._neg_view(-grad_out))

    for got, right in zip(gradients(SAME[how]), gradients(torch.clone), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("which", ["x", "alpha"])
def test_a_tensor_of_zeros_without_memory(backend: str, which: str) -> None:
    x, alpha, _ = CASE.tensors()
    if which == "x":
        x = torch._efficientzerotensor(x.shape)
    else:
        alpha = torch._efficientzerotensor(alpha.shape)
    got = fused_meta_pool(x, alpha, NAMES, backend=backend)
    torch.testing.assert_close(got, judge.definition(x.clone(), alpha.clone(), CASE))


def test_a_subclass_stays_one(backend: str) -> None:
    x, alpha, _ = CASE.tensors()
    assert type(fused_meta_pool(x.as_subclass(Tagged), alpha, NAMES, backend=backend)) is Tagged


def test_inference_mode(backend: str) -> None:
    x, alpha, _ = CASE.tensors()
    expected = fused_meta_pool(x, alpha, NAMES, backend=backend)
    with torch.inference_mode():
        inside = fused_meta_pool(x, alpha, NAMES, backend=backend)
        compiled = torch.compile(fused_meta_pool, backend="aot_eager", fullgraph=True)
        traced = compiled(x, alpha, NAMES, backend=backend)
        frozen = x.clone()
    assert inside.is_inference() and torch.equal(inside.clone(), expected)
    torch.testing.assert_close(traced.clone(), expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        fused_meta_pool(frozen, alpha.requires_grad_(), NAMES, backend=backend)


def _nested(t: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([t[0].contiguous(), t[0][:1].contiguous()], layout=layout)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "nested": (lambda t: _nested(t, torch.strided), NotImplementedError, "a nested one; pad it"),
    "jagged": (lambda t: _nested(t, torch.jagged), NotImplementedError, "a nested one; pad it"),
    "mkldnn": (lambda t: t.to_mkldnn(), NotImplementedError, "dense tensor, got layout"),
    "sparse": (lambda t: t.to_sparse(), NotImplementedError, "dense tensor, got layout"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
                  (NotImplementedError, RuntimeError), "qint8"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantiz")
@pytest.mark.parametrize("which", ["x", "alpha"])
@pytest.mark.parametrize("how", REFUSED)
def test_other_memory_is_refused(backend: str, how: str, which: str) -> None:
    make, error, message = REFUSED[how]
    if how == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no mkldnn tensors")
    x, alpha = torch.ones(2, 5, 4, 6), torch.ones(2, 1, 3)
    tensors = (make(x), alpha) if which == "x" else (x, make(alpha))
    with pytest.raises(error, match=message) as raised:
        fused_meta_pool(*tensors, NAMES, backend=backend)
    assert which in str(raised.value)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_meta_and_fake_tensors_have_the_shape_of_the_result(
    backend: str, dtype: torch.dtype, layout: str
) -> None:
    case = Case((2, 5, 9, 6), dtype, layout, candidates=NAMES[1:], stride=(2, 1))
    x, alpha, _ = case.tensors()
    there = [
        torch.empty_strided(t.shape, t.stride(), dtype=dtype, device="meta") for t in (x, alpha)
    ]
    real = fused_meta_pool(x, alpha, case.candidates, backend=backend, **case.options)
    meta = fused_meta_pool(*there, case.candidates, backend=backend, **case.options)
    mode = FakeTensorMode()
    made = [mode.from_tensor(t) for t in (x, alpha)]
    with mode:
        fake = fused_meta_pool(*made, case.candidates, backend=backend, **case.options)
    assert meta.is_meta and isinstance(fake, FakeTensor) and fake.device == x.device
    for out in (meta, fake):
        assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)


def test_gradients_on_the_meta_device(backend: str) -> None:
    x = torch.empty(2, 5, 4, 6, device="meta", requires_grad=True)
    module = MetaPool2d(device="meta", backend=backend)
    grads = torch.autograd.grad(module(x).sum(), (x, module.alpha))
    assert [g.shape for g in grads] == [x.shape, module.alpha.shape]
    assert all(g.is_meta for g in grads)


def test_fx_makes_one_node_of_a_call(backend: str) -> None:
    """So tools that trace with stand-ins, as torchvision's feature extraction does, can trace."""
    network = torch.nn.Sequential(torch.nn.Conv2d(5, 5, 1), MetaPool2d(NAMES, backend=backend))
    traced = torch.fx.symbolic_trace(network)
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [fused_meta_pool]
    x = CASE.tensors()[0]
    assert torch.equal(traced(x), network(x))
    (alpha,) = (p for n, p in traced.named_parameters() if n.endswith("alpha"))
    traced(x).square().sum().backward()
    assert alpha.grad is not None and alpha.grad.any()


class Own(torch.nn.Module):
    """As the README shows it."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.alpha = torch.nn.Parameter(1e-3 * torch.randn(3))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return fused_meta_pool(x, self.alpha, NAMES, backend=self.backend)


TRACED: dict[str, Callable[[str], torch.nn.Module]] = {
    "own module": Own,
    "enhancer": lambda backend: SpatialEnhancer(5, NAMES, backend=backend),
    "extras": lambda backend: MetaPool2d(
        NAMES, 5, extra_candidates={"conv": torch.nn.Conv2d(5, 5, 1)}, backend=backend
    ),
    "extras alone": lambda backend: MetaPool2d(
        (), extra_candidates={"conv": torch.nn.Conv2d(5, 5, 1)}, backend=backend
    ),
    "plain": lambda backend: MetaPool2d(NAMES, stride=1, backend=backend).to_torch(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", TRACED)
def test_fx_takes_calls_from_anywhere(backend: str, how: str, dtype: torch.dtype) -> None:
    """The op makes itself a node, and not the module of ours in which it is called."""
    module = TRACED[how](backend).to(dtype)
    traced = torch.fx.symbolic_trace(module)
    x = CASE.tensors()[0].to(dtype)
    for maps in (x, x[0]) if how.startswith("extras") else (x,):
        assert torch.equal(traced(maps), module(maps))


def test_what_watches_functions_sees_one_call(backend: str) -> None:
    seen: list[object] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x, alpha, _ = CASE.tensors()
    expected = fused_meta_pool(x, alpha, NAMES, normalize=None, backend=backend)
    with Watch():
        got = fused_meta_pool(x, alpha, NAMES, normalize=None, backend=backend)
    assert seen == [fused_meta_pool]
    assert torch.equal(got, expected)


def test_make_fx_traces_through_a_call_and_its_gradient(backend: str) -> None:
    x, alpha, _ = CASE.tensors()

    def gradient(x: Tensor, alpha: Tensor) -> Tensor:
        function = judge.fused(backend)
        out: Tensor = torch.func.grad(lambda a: function(x, a, CASE).tanh().sum())(alpha)
        return out

    torch.testing.assert_close(make_fx(gradient)(x, alpha)(x, alpha), gradient(x, alpha))
