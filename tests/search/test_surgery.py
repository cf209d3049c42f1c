"""Enhancers put into networks by the names of their modules."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from metapool_kernels import MetaPool2d, NormalizedMetaPool2d, SpatialEnhancer
from metapool_kernels.plain import Scaled, WeightedSum
from metapool_kernels.search.networks.derive import derive_network
from metapool_kernels.search.networks.surgery import (
    Site,
    add_enhancers,
    find_sites,
    insert_enhancers,
    site_table,
)

PATTERN = r"blocks\.[1-6]\.\d+\.bn2"


class Network(NamedTuple):
    """A network, after which of its modules a user would put enhancers, and how many these are."""

    make: Callable[..., nn.Module]
    name: str
    after: str
    after_type: str | None
    sites: int


NETWORKS = {
    "timm MobileNetV2": Network(
        timm.create_model, "mobilenetv2_035", r"blocks\.[1-6]\.\d+\.bn2", None, 16
    ),
    "timm MobileNetV3": Network(
        timm.create_model, "mobilenetv3_small_050", r"blocks\.[1-6]\.\d+\.bn2", None, 10
    ),
    "timm ResNet": Network(timm.create_model, "resnet18", r"layer\d\.\d+\.act1", None, 8),
    "torchvision MobileNetV2": Network(
        torchvision.models.get_model,
        "mobilenet_v2",
        r"features\.\d+\.conv\.1",
        "Conv2dNormActivation",
        16,
    ),
    "torchvision MobileNetV3": Network(
        torchvision.models.get_model,
        "mobilenet_v3_small",
        r"features\.([2-9]|1\d)\.block\.1",
        None,
        10,
    ),
    "torchvision ShuffleNetV2": Network(
        torchvision.models.get_model, "shufflenet_v2_x0_5", r"stage\d\.\d+\.branch2\.4", None, 16
    ),
    "torchvision ResNet": Network(
        torchvision.models.get_model, "resnet18", r"layer\d\.\d+\.bn1", None, 8
    ),
}
"""In MobileNets and ShuffleNets after the depthwise convolution, in ResNets between both."""

FEW = ("skip_connect", "max_pool_3x3", "avg_pool_5x5")


def randomise(model: nn.Module) -> None:
    """Move every alpha and every norm away from where it began.

    timm's ResNets begin with norms of weight 0, which let no gradient through.
    """
    for module in model.modules():
        if isinstance(module, MetaPool2d):
            module.alpha.data.normal_()
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_takes_enhancers_learns_and_gives_the_best_of_them(name: str) -> None:
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.make(network.name, num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    sites = add_enhancers(model, x, network.after, after_type=network.after_type, candidates=FEW)
    enhancers = [m for m in model.modules() if isinstance(m, SpatialEnhancer)]
    assert len(sites) == len(enhancers) == network.sites
    for site in sites:
        assert isinstance(model.get_submodule(f"{site.name}.enhancer"), SpatialEnhancer)

    randomise(model)
    model(x).square().sum().backward()
    for enhancer in enhancers:
        alpha = enhancer.pool.alpha
        assert alpha.grad is not None and alpha.grad.isfinite().all()
    assert enhancers[0].pool.alpha.grad.any()

    model.eval()
    before = copy.deepcopy(model.state_dict())
    for keep in (1, 2):
        derived = derive_network(model, keep)
        reduced = copy.deepcopy(model)
        for enhancer in (m for m in reduced.modules() if isinstance(m, SpatialEnhancer)):
            enhancer.reduce(enhancer.pool.alpha.argsort(descending=True)[:keep].tolist())
        out = derived(x)
        torch.testing.assert_close(out, reduced(x), rtol=1e-4, atol=1e-4 * out.abs().max().item())
        ours = {type(m) for m in derived.modules() if "metapool" in type(m).__module__}
        assert ours == (set() if keep == 1 else {WeightedSum, Scaled})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_enhancer_follows_a_block_without_expansion() -> None:
    network = NETWORKS["torchvision MobileNetV2"]
    model = network.make(network.name)
    example = torch.zeros(1, 3, 32, 32)
    sites = find_sites(model, network.after, example, type_name=network.after_type)
    assert sites[0] == Site("features.2.conv.1", "Conv2dNormActivation", 96, (8, 8))
    without_type = find_sites(model, network.after, example)
    assert without_type[0] == Site("features.1.conv.1", "Conv2d", 16, (16, 16))


@pytest.fixture
def mobilenet() -> nn.Module:
    model: nn.Module = timm.create_model("mobilenetv2_035", num_classes=10, output_stride=4)
    return model


def test_mobilenetv2_has_sixteen_sites_in_the_order_it_runs(mobilenet: nn.Module) -> None:
    sites = find_sites(mobilenet, PATTERN, torch.zeros(1, 3, 32, 32))
    assert len(sites) == 16
    assert sites[0] == Site("blocks.1.0.bn2", "BatchNormAct2d", 48, (8, 8))
    assert sites[-1] == Site("blocks.6.0.bn2", "BatchNormAct2d", 336, (8, 8))
    for site in sites:
        block = mobilenet.get_submodule(site.name.removesuffix(".bn2"))
        assert block.conv_pwl.in_channels == site.channels


def test_the_map_size_is_that_of_the_strided_output() -> None:
    model = timm.create_model("mobilenetv2_035", num_classes=10)
    sites = find_sites(model, PATTERN, torch.zeros(1, 3, 64, 48))
    assert [site.map_size for site in sites[:3]] == [(16, 12), (16, 12), (8, 6)]


def test_looking_for_sites_changes_nothing(mobilenet: nn.Module) -> None:
    mobilenet.blocks[0].eval()
    before = {name: value.clone() for name, value in mobilenet.state_dict().items()}
    modes = [module.training for module in mobilenet.modules()]
    found = find_sites(mobilenet, PATTERN, torch.randn(1, 3, 32, 32))
    assert add_enhancers(mobilenet, torch.randn(1, 3, 32, 32), PATTERN, dry_run=True) == found
    assert [module.training for module in mobilenet.modules()] == modes
    assert not any(module._forward_hooks for module in mobilenet.modules())
    assert list(mobilenet.state_dict()) == list(before)
    for name, value in mobilenet.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_enhancer_stands_between_the_activation_and_the_linear_convolution(
    mobilenet: nn.Module,
) -> None:
    sites = find_sites(mobilenet, PATTERN, torch.zeros(1, 3, 32, 32))
    enhancers = insert_enhancers(mobilenet, sites, ("skip_connect", "avg_pool_5x5"))
    assert list(enhancers) == [site.name for site in sites]
    seen: dict[str, Tensor] = {}
    block = mobilenet.blocks[2][1]
    block.bn2.host.register_forward_hook(lambda m, i, o: seen.update(host=o))
    block.bn2.enhancer.register_forward_hook(lambda m, i, o: seen.update(enhanced=o))
    block.conv_pwl.register_forward_pre_hook(lambda m, i: seen.update(linear=i[0]))
    mobilenet.eval()
    out = mobilenet(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 10)
    assert seen["host"].min() >= 0 and seen["host"].max() <= 6
    torch.testing.assert_close(enhancers["blocks.2.1.bn2"](seen["host"]), seen["enhanced"])
    assert torch.equal(seen["linear"], seen["enhanced"])


def test_the_block_without_expansion_gets_none(mobilenet: nn.Module) -> None:
    insert_enhancers(mobilenet, find_sites(mobilenet, PATTERN, torch.zeros(1, 3, 32, 32)))
    holders = {
        name.rsplit(".", 2)[0]
        for name, module in mobilenet.named_modules()
        if isinstance(module, SpatialEnhancer)
    }
    blocks = {
        f"blocks.{i}.{j}" for i, stage in enumerate(mobilenet.blocks) for j in range(len(stage))
    }
    assert blocks - holders == {"blocks.0.0"}
    assert len(holders) == 16


class Odd(nn.Module):
    """``twice`` runs twice, ``never`` does not, ``flat`` gives no map, ``nest`` is nested."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(1, 1, 1)
        self.never = nn.Conv2d(1, 1, 1)
        self.nest = nn.Sequential(nn.Conv2d(1, 4, 1))
        self.flat = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.flat(self.nest(self.twice(self.twice(x))))
        return out


@pytest.mark.parametrize(
    ("pattern", "type_name", "message"),
    [
        ("bn2", None, "matches no module"),
        ("(", None, "no regular expression"),
        ("twice", None, "run once"),
        ("never", None, "run once"),
        ("flat", None, "run once"),
        (r"nest.*", None, "inside it"),
        ("nest|flat", "Conv2d", "none is a 'Conv2d'; they are Flatten, Sequential"),
    ],
)
def test_a_pattern_without_a_usable_place_is_refused(
    pattern: str, type_name: str | None, message: str
) -> None:
    model = Odd()
    with pytest.raises(ValueError, match=message):
        add_enhancers(model, torch.zeros(1, 1, 3, 3), pattern, after_type=type_name)
    assert not any(isinstance(module, SpatialEnhancer) for module in model.modules())


def test_poolings_are_normalised_where_that_is_asked_for(mobilenet: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    add_enhancers(mobilenet, x, PATTERN, candidates=FEW, candidate_norm=True)
    pools = [m.pool for m in mobilenet.modules() if isinstance(m, SpatialEnhancer)]
    assert pools and all(isinstance(pool, NormalizedMetaPool2d) for pool in pools)
    mobilenet.train()(x)
    best = derive_network(mobilenet.eval(), keep=2)
    norms = sum(isinstance(m, nn.BatchNorm2d) and not m.affine for m in best.modules())
    assert norms >= len(pools)
    assert best(x).isfinite().all()


class Elsewhere(nn.Module):
    """Runs modules in other ways than by their names, with one input, for their output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 1)
        self.alias = self.first
        self.listed = nn.Conv2d(4, 4, 1)
        self.steps = [self.listed]
        self.looked_at = nn.Conv2d(4, 4, 1)
        self.two = nn.Bilinear(4, 4, 4)
        self.last = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alias(x)
        for step in self.steps:
            x = step(x)
        x = self.looked_at(x) + self.looked_at.weight.sum()
        x = self.two(x.movedim(1, -1), x.movedim(1, -1)).movedim(-1, 1)
        out: Tensor = self.last(x.movedim(1, -1))
        return out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first", "would pass the enhancers by"),
        ("listed", "would pass the enhancers by"),
        ("looked_at", "wants more of them.*'weight'"),
        ("two", "wants more of them.*but 3 were given"),
        ("last", r"gives \(N, H, W, C\), here \(1, 5, 3, 4\)"),
    ],
)
def test_a_place_that_the_network_does_not_run_is_refused(name: str, message: str) -> None:
    model = Elsewhere()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        add_enhancers(model, torch.zeros(1, 1, 5, 3), name)
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_hooks for module in modules.values())


@pytest.mark.parametrize(
    ("name", "after", "arguments"),
    [
        ("dla46_c", r"level3\.tree1", {}),
        ("swin_tiny_patch4_window7_224", r"layers\.0", {"img_size": 64, "window_size": 2}),
    ],
)
def test_networks_of_timm_with_other_maps_or_calls_are_refused(
    name: str, after: str, arguments: dict[str, Any]
) -> None:
    model = timm.create_model(name, **arguments)
    with pytest.raises(ValueError, match="cannot be followed by"):
        find_sites(model, after, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "candidates",
    [{"candidates": ["max_pool_4x4"]}, {"extra_candidates": ["convolution"]}, {"candidates": []}],
)
def test_a_candidate_that_there_is_not_leaves_the_network_alone(
    candidates: dict[str, list[str]],
) -> None:
    model = Odd()
    with pytest.raises(ValueError, match="candidate"):
        add_enhancers(model, torch.zeros(1, 1, 3, 3), "nest", **candidates)  # type: ignore[arg-type]
    assert not any(isinstance(module, SpatialEnhancer) for module in model.modules())


def test_an_own_network_takes_enhancers_by_type_and_not_twice() -> None:
    model = Odd()
    x = torch.randn(2, 1, 5, 3)
    sites = add_enhancers(model, x, r"nest.*", after_type="Conv2d")
    assert sites == [Site("nest.0", "Conv2d", 4, (5, 3))]
    assert model(x).shape == (2, 60)
    assert site_table(sites).splitlines()[2].split() == ["nest.0", "Conv2d", "4", "5x3"]
    for pattern in (r"nest\.0", r"nest\.0\.host"):
        with pytest.raises(ValueError, match="has an enhancer already"):
            add_enhancers(model, x, pattern)
    randomise(model)
    assert derive_network(model).eval()(x).shape == (2, 60)


def test_enhancers_follow_the_dtype_and_the_mode_of_their_network() -> None:
    model = Odd().double()
    model.nest[0].eval()
    add_enhancers(model, torch.zeros(1, 1, 5, 3, dtype=torch.float64), "nest")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.randn(2, 1, 5, 3, dtype=torch.float64)).dtype is torch.float64
    assert not model.nest.host[0].training and model.nest.enhancer.norm.training


def test_deriving_ranks_by_size_and_by_the_mean_over_channels() -> None:
    torch.manual_seed(0)
    raw = nn.Sequential(SpatialEnhancer(2, FEW, normalize=None))
    raw[0].pool.alpha.data = torch.tensor([0.1, -0.9, 0.5])
    plain = derive_network(raw)[0][0]
    assert isinstance(plain, WeightedSum)
    assert isinstance(plain.pools[0], nn.MaxPool2d) and plain.weights.tolist() == [
        pytest.approx(-0.9)
    ]
    own = nn.Sequential(SpatialEnhancer(2, FEW, per_channel=True))
    own[0].pool.alpha.data = torch.tensor([[2.0, 0.0, 1.5], [-9.0, 0.0, 1.5]])
    assert isinstance(derive_network(own)[0][0][1], nn.AvgPool2d)
    whole = derive_network(own.eval(), keep=7)
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(whole(x), own(x))


class Residual(SpatialEnhancer):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Doubled(MetaPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(make: Callable[[nn.Module, Any], object]) -> SpatialEnhancer:
    """An enhancer with a hook that changes what comes out of it, and one on its pooling."""
    enhancer = SpatialEnhancer(4, FEW)
    for module in (enhancer, enhancer.pool):
        make(module, lambda module, args, *out: out[0] - 1 if out else args[0] * args[0])
    return enhancer


def with_a_pooling_of_its_own() -> SpatialEnhancer:
    enhancer = SpatialEnhancer(4, FEW)
    enhancer.pool = Doubled(FEW)
    return enhancer


def patched() -> SpatialEnhancer:
    enhancer = SpatialEnhancer(4, FEW)
    enhancer.forward = MethodType(  # type: ignore[method-assign]
        lambda self, x: x + SpatialEnhancer.forward(self, x), enhancer
    )
    return enhancer


OWN: dict[str, Callable[[], nn.Module]] = {
    "enhancer": lambda: Residual(4, FEW),
    "pooling": with_a_pooling_of_its_own,
    "pooling alone": lambda: nn.Sequential(SpatialEnhancer(4, FEW), Doubled(FEW)),
    "forward of one object": patched,
    "hooks": lambda: hooked(nn.Module.register_forward_hook),
    "hooks before": lambda: hooked(nn.Module.register_forward_pre_hook),
}


@pytest.mark.parametrize("whole", [False, True], ids=["inside", "the network itself"])
@pytest.mark.parametrize("how", OWN)
def test_what_a_network_computes_by_itself_stays(how: str, whole: bool) -> None:
    torch.manual_seed(0)
    own = OWN[how]()
    network = own if whole else nn.Sequential(nn.Conv2d(3, 4, 1), own)
    randomise(network)
    network.eval()
    x = torch.randn(2, 4 if whole else 3, 6, 6)
    derived = derive_network(network, keep=len(FEW))
    torch.testing.assert_close(derived(x), network(x), rtol=1e-5, atol=1e-5)
    pools = [m.pool for m in derived.modules() if isinstance(m, SpatialEnhancer)]
    assert how != "enhancer" or [type(pool).__name__ for pool in pools] == ["WeightedSum"]
    with pytest.raises(ValueError, match="has no enhancer"):
        derive_network(derive_network(OWN["enhancer"]()))


@pytest.mark.parametrize(
    ("keep", "model", "message"),
    [
        (0, nn.Sequential(SpatialEnhancer(2)), "at least 1, got 0"),
        (1, nn.Sequential(nn.Conv2d(1, 1, 1)), "has no enhancer"),
    ],
)
def test_there_must_be_something_to_keep(keep: int, model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        derive_network(model, keep)
