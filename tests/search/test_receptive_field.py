"""Receptive fields against values computed by hand."""

import pytest
import timm
import torch
from torch import Tensor, nn

from metapool_kernels import SpatialEnhancer
from metapool_kernels.search.networks.receptive_field import receptive_fields
from metapool_kernels.search.networks.surgery import find_sites, insert_enhancers


def test_a_chain_of_windows_strides_and_dilation() -> None:
    """r' = r + (k - 1) * dilation * jump, where the jump is the product of the strides before."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),  # 3, jump 1
        nn.ReLU6(),
        nn.MaxPool2d(3, stride=2, padding=1),  # 3 + 2 * 1 = 5, jump 2
        nn.Conv2d(4, 4, 5, padding=2, groups=4),  # 5 + 4 * 2 = 13
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 3, 3, stride=2, padding=3, dilation=3),  # 13 + 2 * 3 * 2 = 25, jump 4
        nn.AvgPool2d((1, 3), stride=1, padding=(0, 1)),  # wider by 2 * 4
        nn.Hardswish(),
    )
    fields = receptive_fields(model, ["0", "2", "3", "5", "7"], (2, 64, 48))
    assert fields == {"0": (3, 3), "2": (5, 5), "3": (13, 13), "5": (25, 25), "7": (25, 33)}


def test_nothing_is_seen_beyond_the_edge() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 7, padding=3), nn.Conv2d(1, 1, 7, padding=3))
    # Of 6 rows the centre unit is number 3: from -3 to 9 it sees all, and so it does of 9 columns.
    assert receptive_fields(model, ["0", "1"], (1, 6, 9)) == {"0": (6, 7), "1": (6, 9)}


def test_larger_images_show_fields_beyond_small_ones() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 7, padding=3), nn.Conv2d(1, 1, (7, 5), padding=(3, 2)))
    fields = receptive_fields(model, ["0", "1"], (1, 6, 9), least=40)
    assert fields == {"0": (7, 7), "1": (13, 11)}


def test_a_network_for_images_of_one_size_is_measured_on_these() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 9, padding=4), nn.Flatten(), nn.Linear(72, 3))
    assert receptive_fields(model, ["0"], (1, 6, 6), least=40) == {"0": (6, 6)}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv2d(1, 2, 1)
        self.wide = nn.Conv2d(1, 2, (3, 9), padding=(1, 4))
        self.tall = nn.Conv2d(1, 2, (11, 1), padding=(5, 0))
        self.joined = nn.Identity()
        self.far = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([self.short(x), self.wide(x), self.tall(x)], 1)
        out: Tensor = self.far(self.joined(maps)) + x
        return out


def test_parallel_branches_see_what_the_widest_sees() -> None:
    fields = receptive_fields(Branches(), ["short", "wide", "tall", "joined", "far"], (1, 30, 30))
    assert fields == {
        "short": (1, 1),
        "wide": (3, 9),
        "tall": (11, 1),
        "joined": (11, 9),
        "far": (13, 11),
    }


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Sigmoid())
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = self.out(x * self.gate(x))
        return out


def test_squeeze_and_excite_sees_the_whole_image() -> None:
    fields = receptive_fields(Excited(), ["conv", "out"], (1, 20, 24))
    assert fields == {"conv": (3, 3), "out": (20, 24)}


def test_what_ignores_the_image_sees_nothing() -> None:
    model = nn.Sequential(nn.AvgPool2d(1), SpatialEnhancer(1, ["none"]))
    assert receptive_fields(model, ["1"], (1, 4, 4)) == {"1": (0, 0)}


@pytest.mark.parametrize(
    ("candidates", "window"),
    [
        (["skip_connect"], 1),
        (["max_pool_3x3"], 3),
        (["avg_pool_7x7"], 7),
        (["max_pool_3x3", "avg_pool_5x5"], 5),
        (["skip_connect", "max_pool_7x7", "avg_pool_3x3"], 7),
    ],
)
def test_an_enhancer_sees_its_largest_window(candidates: list[str], window: int) -> None:
    """Also that the fused op carries a NaN to the windows that hold it, and no further."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), SpatialEnhancer(4, candidates))
    assert receptive_fields(model, ["1"], (1, 33, 20)) == {"1": (window, window)}


def test_mobilenetv2_with_and_without_enhancers() -> None:
    """Depthwise windows of 3 after a stem of 3 with stride 2; jumps of 2, 4, 4, 8, 8, 8, 16."""
    model = timm.create_model("mobilenetv2_035", num_classes=10)
    sites = find_sites(model, r"blocks\.[1-3]\.\d+\.bn2", torch.zeros(1, 3, 96, 96))
    names = [site.name for site in sites][:4]
    plain = receptive_fields(model, names, (3, 96, 96))
    assert list(plain.values()) == [(11, 11), (19, 19), (27, 27), (43, 43)]
    # Behind a depthwise convolution of stride 2 the enhancer's own jump is already doubled.
    insert_enhancers(model, sites, ["avg_pool_3x3"])
    searched = receptive_fields(model, names, (3, 96, 96))
    assert list(searched.values()) == [(19, 19), (35, 35), (59, 59), (91, 91)]


def test_the_network_comes_back_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    receptive_fields(model, ["1"], (1, 8, 8))
    assert [module.training for module in model] == [True, False, True]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_name_that_the_network_lacks() -> None:
    with pytest.raises(AttributeError, match="nowhere"):
        receptive_fields(nn.Sequential(), ["nowhere"], (1, 4, 4))
