"""MetaPool2d and SpatialEnhancer: what they own, keep, give up and turn into."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from metapool_kernels import DEFAULT_CANDIDATES, MetaPool2d, SpatialEnhancer, fused_meta_pool
from metapool_kernels.convertible import has_plain_form
from metapool_kernels.nn import INITIAL_ALPHA_STD
from metapool_kernels.plain import WeightedSum
from tests import cases, judge
from tests.cases import CANDIDATES

X = torch.randn(2, 6, 7, 9, generator=torch.Generator().manual_seed(0))

OPTIONS = {
    "default": {},
    "per channel": {"channels": 6},
    "raw": {"normalize": None},
    "stride": {"candidates": CANDIDATES["no_skip"], "stride": 2},
    "strides": {"candidates": CANDIDATES["strips"], "stride": (1, 3)},
    "no pad count": {"candidates": CANDIDATES["avg"], "count_include_pad": False},
    "none": {"candidates": CANDIDATES["with_none"], "channels": 6},
    "strided none": {"candidates": ("none", "avg_pool_3x3"), "stride": 2},
    "duplicates": {"candidates": CANDIDATES["duplicates"]},
    "one": {"candidates": ("max_pool_5x5",)},
    "one skip": {"candidates": ("skip_connect",)},
    "one raw": {"candidates": ("avg_pool_3x3",), "normalize": None},
}


def _module(name: str, **more: object) -> MetaPool2d:
    torch.manual_seed(1)
    module = MetaPool2d(**OPTIONS[name], **more)  # type: ignore[arg-type]
    with torch.no_grad():
        module.alpha.normal_()
    return module


def test_alpha_starts_near_zero() -> None:
    torch.manual_seed(0)
    alpha = torch.stack([MetaPool2d().alpha.detach() for _ in range(500)])
    assert alpha.shape == (500, 7)
    assert abs(alpha.std().item() / INITIAL_ALPHA_STD - 1) < 0.1
    assert abs(alpha.mean().item()) < 0.1 * INITIAL_ALPHA_STD
    assert INITIAL_ALPHA_STD == 1e-3


def test_initialisation_follows_the_seed() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(MetaPool2d(channels=4).alpha)
    assert torch.equal(*drawn)
    before = drawn[0].clone()
    module = MetaPool2d(channels=4)
    module.reset_parameters()
    assert module.alpha.shape == (4, 7) and not torch.equal(module.alpha, before)


def test_what_a_module_owns() -> None:
    assert [name for name, _ in MetaPool2d().named_parameters()] == ["alpha"]
    assert list(MetaPool2d().state_dict()) == ["alpha"]
    assert MetaPool2d().alpha.requires_grad
    assert MetaPool2d(device="meta", dtype=torch.float64).alpha.is_meta
    assert MetaPool2d(dtype=torch.float64).alpha.dtype is torch.float64
    assert MetaPool2d().candidates == DEFAULT_CANDIDATES


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_is_the_op(backend: str, name: str) -> None:
    module = _module(name, backend=backend)
    options = {"normalize": module.normalize, "stride": module.stride}
    expected = fused_meta_pool(
        X, module.alpha, module.candidates, count_include_pad=module.count_include_pad,
        backend=backend, **options,
    )  # fmt: skip
    assert torch.equal(module(X), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_weights(name: str) -> None:
    module = _module(name)
    weights = module.weights()
    assert weights.shape == module.alpha.shape
    if module.normalize == "softmax":
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    else:
        assert torch.equal(weights, module.alpha)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", cases.NATIVE_LAYOUTS)
def test_to_torch_gives_the_same_output(backend: str, layout: str, name: str) -> None:
    module = _module(name, backend=backend)
    plain = module.to_torch()
    x = cases.LAYOUTS[layout](X)
    torch.testing.assert_close(plain(x), module(x), rtol=1e-6, atol=1e-6)
    assert not list(plain.parameters())
    used = {type(part).__module__.split(".")[0] for part in plain.modules()} - {"metapool_kernels"}
    assert used <= {"torch"}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("skip_connect", nn.Identity),
        ("max_pool_5x3", nn.MaxPool2d),
        ("avg_pool_1x7", nn.Sequential),
    ],
)
def test_a_single_candidate_becomes_that_pooling(name: str, kind: type[nn.Module]) -> None:
    plain = MetaPool2d([name]).to_torch()
    assert type(plain) is kind
    assert isinstance(MetaPool2d([name], normalize=None).to_torch(), WeightedSum)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_to_torch_scripts_and_moves(backend: str) -> None:
    """Plain modules follow dtype, state_dict and deepcopy, as everything in torch.nn does."""
    module = _module("per channel", backend=backend)
    plain = module.to_torch()
    before = plain(X)
    module.alpha.data.add_(torch.randn(6, 7))
    assert torch.equal(plain(X), before), "the frozen weights follow the module"
    assert torch.equal(torch.jit.script(plain)(X), before)
    loaded = copy.deepcopy(plain)
    loaded.load_state_dict(plain.state_dict())
    torch.testing.assert_close(loaded.double()(X.double()), before.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["default", "per channel", "raw"])
def test_reduce(backend: str, name: str) -> None:
    module = _module(name, backend=backend).eval()
    module.alpha.requires_grad_(False)
    reduced = module.reduce([5, 0, 2])
    assert reduced.candidates == tuple(module.candidates[k] for k in (5, 0, 2))
    assert torch.equal(reduced.alpha, module.alpha[..., [5, 0, 2]])
    assert not reduced.alpha.requires_grad and not reduced.training
    assert reduced.alpha.data_ptr() != module.alpha.data_ptr()
    assert len(module.candidates) == 7
    kept = ("normalize", "stride", "count_include_pad", "backend", "channels")
    assert all(getattr(reduced, key) == getattr(module, key) for key in kept)
    expected = fused_meta_pool(
        X, module.alpha[..., [5, 0, 2]], reduced.candidates, normalize=module.normalize,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(reduced(X), expected)


def test_reduce_to_everything_changes_nothing(backend: str) -> None:
    module = _module("default", backend=backend)
    assert torch.equal(module.reduce(range(7))(X), module(X))


class Halved(MetaPool2d):
    """A forward of its own, and something beside it."""

    share = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.share * super().forward(x)


class HalvedBothWays(Halved):
    def to_torch(self) -> nn.Module:
        plain = MetaPool2d(self.candidates).to_torch()
        assert isinstance(plain, WeightedSum)
        return WeightedSum(plain.pools, self.share * self.weights().detach())


@pytest.mark.parametrize("kind", [Halved, HalvedBothWays])
def test_a_subclass_stays_one_when_it_is_reduced(backend: str, kind: type[Halved]) -> None:
    module = kind(backend=backend)
    module.share = 0.25
    module.register_forward_hook(lambda module, args, out: out + 1)
    reduced = module.reduce([5, 0, 2])
    assert type(reduced) is kind and len(module.candidates) == 7
    assert module.alpha.shape == (7,) and reduced.alpha.shape == (3,)
    whole = MetaPool2d(backend=backend)
    whole.load_state_dict(module.state_dict())
    torch.testing.assert_close(reduced(X), 0.25 * whole.reduce([5, 0, 2])(X) + 1)


def test_a_forward_of_its_own_is_never_forgotten() -> None:
    class Residual(SpatialEnhancer):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    inside = SpatialEnhancer(6)
    inside.pool = Halved()
    patched = MetaPool2d()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for module in (Halved(), Residual(6), inside, patched):
        assert not has_plain_form(module)
        with pytest.raises(NotImplementedError, match="give its class a to_torch"):
            module.to_torch()
    both = HalvedBothWays()
    assert has_plain_form(both) and not has_plain_form(nn.Conv2d(1, 1, 1))
    torch.testing.assert_close(both.to_torch()(X), both(X), rtol=1e-6, atol=1e-6)


def test_a_parametrized_alpha_is_a_plain_one_when_reduced() -> None:
    class Doubled(nn.Module):
        def forward(self, alpha: Tensor) -> Tensor:
            return 2 * alpha

    module = _module("default")
    nn.utils.parametrize.register_parametrization(module, "alpha", Doubled())
    reduced = module.reduce([5, 0])
    assert type(reduced) is MetaPool2d and [n for n, _ in reduced.named_parameters()] == ["alpha"]
    assert torch.equal(reduced.alpha, module.alpha[[5, 0]])
    assert nn.utils.parametrize.is_parametrized(module, "alpha")


def _through_pickle(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def _through_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(module)
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, 9.0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


COPIES = {"deepcopy": copy.deepcopy, "pickle": _through_pickle, "save": _through_save}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [lambda: MetaPool2d(channels=6), lambda: SpatialEnhancer(6)])
def test_copies_compute_the_same(make, how: str) -> None:  # type: ignore[no-untyped-def]
    module = make().eval()
    copied = COPIES[how](module)
    assert repr(copied) == repr(module)
    assert torch.equal(copied(X), module(X))
    ours = {p.data_ptr() for p in module.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in copied.parameters())


def test_state_dict_of_another_number_of_candidates_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for alpha"):
        MetaPool2d(("none",)).load_state_dict(MetaPool2d().state_dict())


def test_repr_names_the_candidates() -> None:
    text = repr(MetaPool2d(("max_pool_3x3", "none"), channels=4, stride=2))
    assert all(part in text for part in ("max_pool_3x3", "channels=4", "(2, 2)", "softmax"))


@pytest.mark.parametrize("per_channel", [False, True])
def test_enhancer(backend: str, per_channel: bool) -> None:
    enhancer = SpatialEnhancer(6, per_channel=per_channel, backend=backend)
    assert enhancer.pool.alpha.shape == ((6, 7) if per_channel else (7,))
    expected = nn.functional.hardswish(enhancer.norm(enhancer.pool(X)))
    torch.testing.assert_close(enhancer(X), expected)
    assert enhancer(X).shape == X.shape
    enhancer.eval()
    plain = enhancer.to_torch()
    torch.testing.assert_close(plain(X), enhancer(X), rtol=1e-6, atol=1e-6)
    assert plain[1] is enhancer.norm
    enhancer.reduce([1, 3])
    assert enhancer.pool.candidates == (DEFAULT_CANDIDATES[1], DEFAULT_CANDIDATES[3])
    assert enhancer(X).shape == X.shape


def test_enhancer_learns(backend: str) -> None:
    torch.manual_seed(0)
    enhancer = SpatialEnhancer(6, backend=backend)
    target = enhancer(X).detach().roll(1, 0)
    optimizer = torch.optim.Adam(enhancer.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (enhancer(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in enhancer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_of_x(backend: str, dtype: torch.dtype) -> None:
    module = _module("default", backend=backend)
    for x in (X, X.to(dtype)):
        outside = module(x)
        with torch.autocast("cpu", dtype=dtype):
            inside = module(x)
        assert inside.dtype is x.dtype
        assert torch.equal(inside, outside)


def test_autocast_in_a_network(backend: str) -> None:
    network = nn.Sequential(nn.Conv2d(6, 6, 1), MetaPool2d(backend=backend), nn.Conv2d(6, 2, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(X)
        out.float().square().sum().backward()
    assert out.dtype is torch.bfloat16
    gradients: list[Tensor | None] = [p.grad for p in network.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert network[1].alpha.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_module_in_another_dtype(backend: str, dtype: torch.dtype) -> None:
    case = cases.Case(X.shape, dtype)
    module = _module("default", backend=backend).to(dtype)
    out = module(X.to(dtype))
    assert out.dtype is dtype
    truth = judge.truth(X.to(dtype), module.alpha.detach(), case)
    error = (out.double() - truth).abs().max().item()
    assert error <= max(torch.finfo(dtype).eps, 1e-12) * truth.abs().max().item()
