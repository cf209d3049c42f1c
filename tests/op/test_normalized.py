"""Poolings normalised before they are mixed: DARTS' own operation, statistics, the module."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool_kernels import (
    DEFAULT_CANDIDATES,
    MetaPool2d,
    NormalizedMetaPool2d,
    SpatialEnhancer,
    fused_meta_pool,
    fused_normalized_meta_pool,
)
from metapool_kernels.convertible import to_plain
from metapool_kernels.plain import Form, WeightedSum
from tests import cases
from tests.backends import DEVICE

NAMES = ("none", "max_pool_3x3", "skip_connect", "avg_pool_3x3", "max_pool_5x5")


def _on_backend(backend: str, x: Tensor, alpha: Tensor, *arguments: Any, **options: Any) -> Tensor:
    there = (t if t is None else t.to(DEVICE) for t in (x, alpha))
    out: Tensor = fused_normalized_meta_pool(*there, *arguments, backend=backend, **options)
    return out.to("cpu")


class _MixedOp(nn.Module):
    """The mixed operation of DARTS with the poolings among its primitives.

    Each pooling is followed by a BatchNorm2d without affine parameters; the identity and zeros are
    not. The weights come from outside, as a softmax over architecture parameters.
    """

    def __init__(self, names: tuple[str, ...], channels: int, stride: int = 1) -> None:
        super().__init__()
        self.ops = nn.ModuleList(self._primitive(name, channels, stride) for name in names)

    @staticmethod
    def _primitive(name: str, channels: int, stride: int) -> nn.Module:
        if name in ("none", "skip_connect"):
            return nn.Identity()
        size = int(name[-1])
        pool = (
            nn.MaxPool2d(size, stride, size // 2)
            if name.startswith("max")
            else nn.AvgPool2d(size, stride, size // 2, count_include_pad=False)
        )
        return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False))

    def forward(self, x: Tensor, weights: Tensor, names: tuple[str, ...]) -> Tensor:
        terms = (
            w * (0 * x if name == "none" else op(x))
            for w, op, name in zip(weights, self.ops, names, strict=True)
        )
        total: Tensor = sum(terms)  # type: ignore[assignment]
        return total


class _Darts(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixed = _MixedOp(NAMES, channels)
        self.alpha = nn.Parameter(1e-3 * torch.randn(len(NAMES)))

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x, torch.softmax(self.alpha, -1), NAMES)


class _Network(nn.Module):
    def __init__(self, mixed: nn.Module) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.mixed(self.before(x).relu())).square().mean((2, 3))
        return out


def _learn(network: nn.Module) -> tuple[list[float], list[Tensor]]:
    """Losses and architecture parameters of 50 steps that train both sets of parameters."""
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 14, 13, generator=rng, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 4, 3, 0])
    losses, alphas = [], []
    for _ in range(50):
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        alphas.append(network.mixed.alpha.detach().clone())  # type: ignore[union-attr, operator]
    return losses, alphas


@pytest.mark.parametrize("unrolled", [False, True], ids=["first_order", "second_order"])
def test_darts_learns_the_same(native: str, unrolled: bool) -> None:
    """From the same start, 50 steps give the same losses, architecture and running statistics."""
    networks = []
    for ours in (True, False):
        torch.manual_seed(0)
        network = _Network(nn.Identity())
        torch.manual_seed(0)
        network.mixed = (
            NormalizedMetaPool2d(8, NAMES, count_include_pad=False, backend=native)
            if ours
            else _Darts(8)
        )
        networks.append(network.double())
    fused, darts = networks
    with torch.no_grad():
        fused.mixed.alpha.copy_(darts.mixed.alpha)
    if unrolled:  # gradients of the architecture through one step of the weights
        for network in networks:
            _unroll(network)
    (ours, our_alphas), (theirs, their_alphas) = _learn(fused), _learn(darts)
    assert theirs[-1] < theirs[0] - 0.5, "nothing was learnt"
    assert not torch.allclose(their_alphas[0], their_alphas[-1], atol=1e-3)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9
    for a, b in zip(our_alphas, their_alphas, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)
    for k, op in enumerate(darts.mixed.mixed.ops):
        if isinstance(op, nn.Sequential):
            assert torch.allclose(fused.mixed.running_mean[k], op[1].running_mean, rtol=1e-9)
            assert torch.allclose(fused.mixed.running_var[k], op[1].running_var, rtol=1e-9)


def _unroll(network: nn.Module) -> None:
    """Ten steps of alpha along gradients of second order."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, 12, 11, generator=rng, dtype=torch.float64)
    alpha = network.mixed.alpha  # type: ignore[union-attr]
    weights = {name: p for name, p in network.named_parameters() if "alpha" not in name}
    for _ in range(10):
        loss = network(x).square().mean()
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        moved = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        after = torch.func.functional_call(network, moved, (x,)).square().mean()
        (grad,) = torch.autograd.grad(after, alpha)
        with torch.no_grad():
            alpha -= grad  # type: ignore[operator]


def _definition(x: Tensor, alpha: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    total = torch.zeros(())
    for k, name in enumerate(NAMES):
        pooled = fused_meta_pool(x, x.new_ones(1), (name,), normalize=None, backend="reference")
        if "_pool_" in name:
            pooled = F.batch_norm(pooled, mean[k], var[k], training=training, momentum=0.3)
        total = total + torch.softmax(alpha, -1)[..., k, None, None] * pooled
    return total


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", cases.ALPHA_SHAPES)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_statistics_that_run(backend: str, layout: str, shape: str, training: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 9, 8, generator=rng, dtype=torch.float64) + 3
    alpha = torch.randn(cases.ALPHA_SHAPES[shape](3, 5, len(NAMES)), generator=rng).double()
    mean, var = (1 + torch.rand(len(NAMES), 5, generator=rng).double() for _ in range(2))
    found = []
    for ours in (True, False):
        leaves = [
            cases.LAYOUTS[layout](x).clone().requires_grad_(), alpha.clone().requires_grad_()
        ]  # fmt: skip
        running = [t.clone().to(DEVICE) if ours else t.clone() for t in (mean, var)]
        out = (
            _on_backend(backend, *leaves, NAMES, *running, training=training, momentum=0.3)
            if ours
            else _definition(*leaves, *running, training)
        )
        grads = torch.autograd.grad(out.square().sum(), leaves)
        found.append((out, *grads, *(t.to("cpu") for t in running)))
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", ["k", "nck"])
def test_derivatives_of_second_order(native: str, shape: str, training: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x = (torch.randperm(2 * 3 * 5 * 4, generator=rng).double() / 20).view(2, 3, 5, 4)
    names = ("max_pool_3x3", "skip_connect", "avg_pool_3x3")
    alpha = torch.randn(cases.ALPHA_SHAPES[shape](2, 3, 3), generator=rng, dtype=torch.float64)
    running = () if training else (torch.rand(3, 3).double(), 1 + torch.rand(3, 3).double())

    def function(x: Tensor, alpha: Tensor) -> Tensor:
        return _on_backend(native, x, alpha, names, *running, training=training)

    leaves = x.requires_grad_(), alpha.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_transforms(native: str) -> None:
    """Forward mode, mapping and their compositions agree with backward mode."""
    rng = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 2, 3, 5, 4, generator=rng, dtype=torch.float64).unbind()
    alpha = torch.randn(len(NAMES), generator=rng, dtype=torch.float64)
    g = torch.randn(x.shape, generator=rng, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return _on_backend(native, x, alpha, NAMES, training=True)

    out, along = torch.func.jvp(function, (x,), (v,))
    _, back = torch.func.vjp(function, x)
    torch.testing.assert_close((along * g).sum(), (back(g)[0] * v).sum())
    torch.testing.assert_close(out, function(x))
    mapped = torch.func.vmap(function)(torch.stack((x, v)))
    torch.testing.assert_close(mapped, torch.stack((function(x), function(v))))
    leaf = x.clone().requires_grad_()
    (right,) = torch.autograd.grad((function(leaf) * g).sum(), leaf)
    got = torch.func.grad(lambda x: (function(x) * g).sum())(x)
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_a_large_mean_cancels(backend: str, layout: str, dtype: torch.dtype) -> None:
    """Around a mean of 1000, what varies by one is normalised as well as PyTorch does."""
    rng = torch.Generator().manual_seed(0)
    x = cases.LAYOUTS[layout]((1000 + torch.randn(4, 17, 14, 13, generator=rng)).to(dtype))
    alpha = torch.zeros(2)
    names = ("max_pool_3x3", "avg_pool_3x3")
    right = [
        F.batch_norm(pool(x.double()), None, None, training=True)
        for pool in (lambda x: F.max_pool2d(x, 3, 1, 1),
                     lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    ]  # fmt: skip
    got = _on_backend(backend, x, alpha, names, training=True, count_include_pad=False)
    error = (got.double() - sum(right) / 2).abs().max()
    assert error < (5e-4 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps)


SIZES = {name: size for name, (size, _) in cases.SHAPES.items()}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("at", [(0, 0), (4, 5)], ids=["corner", "middle"])
def test_one_channel_that_is_not_finite(backend: str, at: tuple[int, int], bad: float) -> None:
    """It is lost as in PyTorch, and no other one."""
    x = torch.randn(2, 3, 9, 8)
    x[1, 1, at[0], at[1]] = bad
    names = ("max_pool_3x3", "avg_pool_3x3")
    leaf = x.requires_grad_()
    out = _on_backend(backend, leaf, torch.zeros(2), names, training=True)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert out[:, 1].isnan().all() and grad[:, 1].isnan().any()
    assert out[:, ::2].isfinite().all() and grad[:, ::2].isfinite().all()


def test_minus_infinity_that_no_maximum_is_stays_unseen(backend: str) -> None:
    x = torch.randn(2, 2, 9, 8)
    x[0, 0, 0, 0] = -torch.inf
    out = _on_backend(backend, x, torch.zeros(1), ("max_pool_3x3",), training=True)
    right = F.batch_norm(F.max_pool2d(x, 3, 1, 1), None, None, training=True)
    torch.testing.assert_close(out, right)


def test_squares_beyond_float32(native: str) -> None:
    x = torch.randn(2, 2, 9, 8) * 1e30
    out = _on_backend(native, x, torch.zeros(1), ("max_pool_3x3",), training=True)
    right = F.batch_norm(F.max_pool2d(x.double(), 3, 1, 1), None, None, training=True)
    torch.testing.assert_close(out, right.float())


def test_no_images(backend: str) -> None:
    x = torch.zeros(0, 3, 5, 4, requires_grad=True)
    alpha = torch.zeros(len(NAMES), requires_grad=True)
    running = [torch.ones(len(NAMES), 3, device=DEVICE) for _ in range(2)]
    out = _on_backend(backend, x, alpha, NAMES, *running, training=True)
    grads = torch.autograd.grad(out.sum(), (x, alpha))
    assert out.shape == (0, 3, 5, 4) and grads[0].shape == x.shape
    assert torch.equal(grads[1], torch.zeros_like(alpha))
    assert all(torch.equal(r.cpu(), torch.ones(len(NAMES), 3)) for r in running)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(native: str, threads: int) -> None:
    rng = torch.Generator().manual_seed(0)
    for size in ((3, 40, 13, 11), (1, 2, 120, 90), (2, 5, 1, 300)):
        x = torch.randn(size, generator=rng)
        results = []
        for count in (1, threads):
            before = torch.get_num_threads()
            torch.set_num_threads(count)
            try:
                leaf = x.clone().requires_grad_()
                out = _on_backend(native, leaf, torch.zeros(7), DEFAULT_CANDIDATES, training=True)
                results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
            finally:
                torch.set_num_threads(before)
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_no_pooled_map_is_kept(native: str) -> None:
    """What autograd saves beside x: less than one more map of the smallest kind."""
    x = torch.randn(2, 5, 29, 28, device=DEVICE).requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        fused_normalized_meta_pool(
            x, torch.zeros(7, device=DEVICE), DEFAULT_CANDIDATES, training=True, backend=native
        )
    others = [tensor.numel() for pointer, tensor in kept.items() if pointer != x.data_ptr()]
    assert x.data_ptr() in kept and sum(others) <= 7 + 3 * 5 * 7


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiled(training: bool) -> None:
    module = NormalizedMetaPool2d(4, NAMES).train(training)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    results = []
    for function in (module, compiled):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(dict(compiled.named_buffers())[f"_orig_mod.{name}"], buffer)


MODULES = {
    "plain": lambda: NormalizedMetaPool2d(4),
    "channels": lambda: NormalizedMetaPool2d(4, NAMES, per_channel=True, count_include_pad=False),
    "stepping": lambda: NormalizedMetaPool2d(
        4, ("max_pool_3x3", "none", "avg_pool_3x5"), stride=2, momentum=None, eps=1e-3
    ),
    "extra": lambda: NormalizedMetaPool2d(
        4, NAMES, extra_candidates={"conv": nn.Conv2d(4, 4, 3, padding=1)}
    ),
}


def _trained(name: str) -> NormalizedMetaPool2d:
    torch.manual_seed(0)
    module = MODULES[name]()
    for _ in range(3):
        module(2 * torch.randn(3, 4, 9, 8) + 1)
    return module


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_plain_module(name: str, training: bool) -> None:
    module, x = _trained(name).train(training), torch.randn(2, 4, 9, 8)
    plain = module.to_torch(Form(None, None, False))
    assert isinstance(plain, WeightedSum)
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    torch.testing.assert_close(plain(x), module(x))
    norms = [part for part in plain.modules() if isinstance(part, nn.BatchNorm2d)]
    pools = [k for k, each in enumerate(module.candidates) if "_pool_" in each]
    assert len(norms) == len(pools)
    for k, norm in zip(pools, norms, strict=True):  # after one batch each
        torch.testing.assert_close(norm.running_mean, module.running_mean[k])
        torch.testing.assert_close(norm.running_var, module.running_var[k])
        assert torch.equal(norm.num_batches_tracked, module.num_batches_tracked)
        assert torch.equal(kept["running_mean"][k], module.running_mean[k]) is not training


@pytest.mark.parametrize("name", MODULES)
def test_reduced_module_keeps_its_statistics(name: str) -> None:
    module, x = _trained(name).eval(), torch.randn(2, 4, 9, 8)
    keep = [len(module.candidate_names) - 1, 1, 0]
    with torch.no_grad():  # the others weigh nothing
        module.alpha.fill_(-1e9)
        module.alpha[..., keep] = torch.tensor([0.3, -0.2, 0.5])
    reduced = module.reduce(keep)
    assert type(reduced) is NormalizedMetaPool2d
    torch.testing.assert_close(reduced(x), module(x))
    assert torch.equal(reduced.num_batches_tracked, module.num_batches_tracked)
    before = module.running_mean.clone()
    reduced.train()(x)
    assert torch.equal(module.running_mean, before), "statistics are shared"


@pytest.mark.parametrize("name", MODULES)
def test_module_is_copied_pickled_and_loaded(name: str) -> None:
    module, x = _trained(name), torch.randn(2, 4, 9, 8)
    fresh = MODULES[name]()
    fresh.load_state_dict(module.state_dict())
    others = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh
    expected = module.eval()(x)
    for other in others:
        assert torch.equal(other.eval()(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(module).eval())(x), expected)
    assert str(module.candidates) in repr(module) and "eps=" in repr(module)
    module.reset_running_stats()
    assert not module.running_mean.any() and not module.num_batches_tracked
    assert torch.equal(module.running_var, torch.ones_like(module.running_var))


def test_an_error_is_no_batch() -> None:
    module = _trained("stepping")
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with pytest.raises(ValueError, match="more than one value per channel"):
        module(torch.randn(1, 4, 2, 1))
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_all_batches_alike() -> None:
    """Without momentum running statistics are means over batches, as BatchNorm2d has them."""
    module = NormalizedMetaPool2d(4, ("max_pool_3x3",), momentum=None)
    norm = nn.BatchNorm2d(4, momentum=None, affine=False)
    for _ in range(3):
        x = torch.randn(2, 4, 9, 8)
        module(x)
        norm(F.max_pool2d(x, 3, 1, 1))
    torch.testing.assert_close(module.running_mean[0], norm.running_mean)
    torch.testing.assert_close(module.running_var[0], norm.running_var)


def test_enhancer_with_norms() -> None:
    torch.manual_seed(0)
    enhancer = SpatialEnhancer(4, NAMES, candidate_norm=True, per_channel=True)
    assert type(enhancer.pool) is NormalizedMetaPool2d
    assert enhancer.pool.alpha.shape == (4, len(NAMES))
    x = torch.randn(3, 4, 9, 8)
    enhancer(x)
    expected = enhancer.eval()(x)
    model = to_plain(nn.Sequential(copy.deepcopy(enhancer)).eval())
    torch.testing.assert_close(model(x), expected)
    assert not any(isinstance(part, MetaPool2d) for part in model.modules())
    enhancer.reduce([1, 3])
    assert type(enhancer.pool) is NormalizedMetaPool2d
    assert enhancer.pool.running_mean.shape == (2, 4)


X, ALPHA = torch.ones(2, 3, 5, 4), torch.zeros(len(NAMES))
BUFFER = torch.ones(len(NAMES), 3)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "one value": (
        (torch.ones(1, 3, 1, 1), ALPHA, NAMES), {"training": True}, ValueError,
        r"more than one value per channel .* \[1, 3, 1, 1\]",
    ),
    "no statistics": ((X, ALPHA, NAMES), {}, RuntimeError, "running_mean and running_var"),
    "one of two": ((X, ALPHA, NAMES, BUFFER), {"training": True}, RuntimeError, "running_var"),
    "a list": (
        (X, ALPHA, NAMES, [1.0], BUFFER), {}, TypeError, "should be a Tensor or None",
    ),
    "a row": (
        (X, ALPHA, NAMES, BUFFER, BUFFER[0]), {}, RuntimeError,
        r"running_var should have shape \[5, 3\].* got \[3\]",
    ),
    "integers": (
        (X, ALPHA, NAMES, BUFFER.long(), BUFFER), {}, RuntimeError, "should have a floating dtype",
    ),
    "elsewhere": (
        (X, ALPHA, NAMES, BUFFER.to("meta"), BUFFER), {}, RuntimeError, "should be on cpu",
    ),
    "momentum": ((X, ALPHA, NAMES), {"training": True, "momentum": 2}, ValueError, "from 0 to 1"),
    "no momentum": ((X, ALPHA, NAMES), {"training": True, "momentum": None}, TypeError, "a number"),
    "eps": ((X, ALPHA, NAMES), {"training": True, "eps": 0.0}, ValueError, "eps should be above 0"),
    "a flag": ((X, ALPHA, NAMES), {"training": 1}, TypeError, "training should be a bool"),
    "no tensor": (
        ([1.0], ALPHA, NAMES), {"training": True}, TypeError,
        r"fused_normalized_meta_pool\(\): argument 'x' \(position 1",
    ),
    "int32": (
        (X.int(), ALPHA, NAMES), {"training": True}, NotImplementedError,
        "\"fused_normalized_meta_pool\" not implemented for 'int32'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fused_normalized_meta_pool(*arguments, **options)
    assert torch.equal(BUFFER, torch.ones_like(BUFFER))


def test_bad_modules() -> None:
    with pytest.raises(ValueError, match="channels should be at least 1"):
        NormalizedMetaPool2d(0)
    with pytest.raises(TypeError, match="per_channel should be a bool"):
        NormalizedMetaPool2d(3, per_channel=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps should be above 0"):
        NormalizedMetaPool2d(3, eps=-1)
    with pytest.raises(TypeError, match="candidate_norm should be a bool"):
        SpatialEnhancer(3, candidate_norm=1)  # type: ignore[arg-type]
