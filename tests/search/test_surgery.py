"""Enhancers put into networks by the names of their modules."""

import pytest
import timm
import torch
from torch import Tensor, nn

from metapool_kernels import SpatialEnhancer
from metapool_kernels.search.backbone import Backbone
from metapool_kernels.search.surgery import Site, find_sites, insert_enhancers

PATTERN = r"blocks\.[1-6]\.\d+\.bn2"


@pytest.fixture
def mobilenet() -> nn.Module:
    model: nn.Module = timm.create_model("mobilenetv2_035", num_classes=10, output_stride=4)
    return model


def test_mobilenetv2_has_sixteen_sites_in_the_order_it_runs(mobilenet: nn.Module) -> None:
    sites = find_sites(mobilenet, PATTERN, torch.zeros(1, 3, 32, 32))
    assert len(sites) == 16
    assert sites[0] == Site("blocks.1.0.bn2", 48, (8, 8))
    assert sites[-1] == Site("blocks.6.0.bn2", 336, (8, 8))
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
    find_sites(mobilenet, PATTERN, torch.randn(1, 3, 32, 32))
    assert [module.training for module in mobilenet.modules()] == modes
    assert not any(module._forward_hooks for module in mobilenet.modules())
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
    ("pattern", "message"),
    [
        ("bn2", "matches no module"),
        ("(", "no regular expression"),
        ("twice", "run once"),
        ("never", "run once"),
        ("flat", "run once"),
        (r"nest.*", "inside it"),
    ],
)
def test_a_pattern_without_a_usable_place_is_refused(pattern: str, message: str) -> None:
    model = Odd()
    with pytest.raises(ValueError, match=message):
        find_sites(model, pattern, torch.zeros(1, 1, 3, 3))
    assert not any(isinstance(module, SpatialEnhancer) for module in model.modules())


def test_any_module_takes_enhancers() -> None:
    model = Odd()
    sites = find_sites(model, "nest", torch.zeros(1, 1, 5, 3))
    assert sites == [Site("nest", 4, (5, 3))]
    insert_enhancers(model, sites)
    assert model(torch.zeros(2, 1, 5, 3)).shape == (2, 60)


@pytest.mark.parametrize("keep", [True, False])
def test_dilation_is_removed_on_request(keep: bool) -> None:
    arguments = {"output_stride": 4, "num_classes": 10, "in_chans": 1}
    model = Backbone("mobilenetv2_035", arguments, keep, (1, 32, 32)).build(0)
    dilated = [m for m in model.modules() if getattr(m, "dilation", (1, 1)) != (1, 1)]
    assert bool(dilated) is keep
    sites = find_sites(model, PATTERN, torch.zeros(1, 1, 32, 32))
    assert {site.map_size for site in sites} == {(8, 8)}
