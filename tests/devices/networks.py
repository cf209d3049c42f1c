"""Networks that are carried to devices, and images that are out of the ordinary."""

import copy
import re

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metapool_kernels import MetaPool2d
from metapool_kernels.search.networks.attention import CoordinateAttention
from metapool_kernels.search.networks.surgery import add_enhancers

CHANNELS, HEIGHT, WIDTH = 4, 9, 13  # lower than the widest window, and odd

POOLINGS = tuple(
    f"{kind}_pool_{window}"
    for kind in ("max", "avg")
    for window in ("3x3", "5x5", "7x7", "9x9", "15x15", "1x7", "7x1", "3x7")
)
MIXTURES = (
    ("skip_connect", "none", "max_pool_3x3"),
    ("max_pool_15x15", "avg_pool_15x15", "avg_pool_1x7"),
)


class EveryPooling(nn.Module):
    """All of them beside each other, every element of each in the output, and nothing added up."""

    def __init__(self, stride: int | tuple[int, int], count_include_pad: bool) -> None:
        super().__init__()
        options = {"stride": stride, "count_include_pad": count_include_pad, "normalize": None}
        generator = torch.Generator().manual_seed(0)
        pools = [MetaPool2d([name], **options) for name in POOLINGS]
        for pool in pools:
            nn.init.ones_(pool.alpha)
        if stride == 1:
            for names in MIXTURES:
                for channels in (None, CHANNELS):
                    pools.append(MetaPool2d(names, channels, **options))
                    nn.init.normal_(pools[-1].alpha, generator=generator)
        self.pools = nn.ModuleList(pools)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([pool(x).flatten(1) for pool in self.pools], 1)


class AveragesOfOthers(nn.Module):
    """As other networks have them: the odd row kept as in ResNet-D, no stride said, a divisor."""

    def __init__(self, divisor: int | None = None, ceil_mode: bool = False) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            [
                nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
                nn.AvgPool2d((3, 1), 2, (1, 0), count_include_pad=False),
                nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=divisor),
                nn.AvgPool2d(3, 2, 1, divisor_override=divisor),
                nn.AvgPool2d(3, 2, 1, ceil_mode, count_include_pad=False),
                nn.AvgPool2d(3, 2, 1, ceil_mode),
                *(self._strips(counted) for counted in (True, False)),
            ]
        )

    @staticmethod
    def _strips(counted: bool) -> nn.Module:
        options = {"count_include_pad": counted}
        return nn.Sequential(
            nn.AvgPool2d((1, 3), (1, 2), (0, 1), **options),
            nn.AvgPool2d((3, 1), (2, 1), (1, 0), **options),
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [*(pool(x) for pool in self.pools), F.avg_pool2d(x, 3, padding=1)]
        found += [F.avg_pool2d(x, 2, count_include_pad=False), F.avg_pool2d(x, 3)]
        return torch.cat([each.flatten(1) for each in found], 1)


class SharedHeads(nn.Module):
    """Two heads, each on two maps of which one has larger numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(CHANNELS, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        pooled = F.max_pool2d(x, 3, 1, 1)
        pooled = pooled + pooled + pooled
        maps = [self.head(each).flatten(1) for each in (x, pooled)]
        each = [
            self.classifier(F.avg_pool2d(each, (HEIGHT, WIDTH)).flatten(1)) for each in (x, pooled)
        ]
        return torch.cat([*maps, *each], 1)


def attention() -> nn.Module:
    """Coordinate attention alone, every element in the output."""
    torch.manual_seed(0)
    return _calibrated(
        nn.Sequential(CoordinateAttention(CHANNELS), nn.Flatten()), (CHANNELS, HEIGHT, WIDTH)
    )


def mobile(image_size: int = 64) -> nn.Module:
    """A network as the search leaves them: mixtures of several kinds in a MobileNetV2."""
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv2_035", num_classes=10)
    example = torch.zeros(1, 3, image_size, image_size)
    for block, candidates, extras, counted in (
        ("1.0", ("max_pool_15x15", "avg_pool_15x15", "skip_connect"), (), True),
        ("1.1", ("max_pool_1x7",), (), True),
        ("2.0", ("avg_pool_7x7", "max_pool_5x5"), ("coordinate_attention",), False),
        ("2.1", ("avg_pool_7x7",), (), True),
        ("3.0", ("skip_connect",), ("coordinate_attention",), True),
        ("3.1", ("max_pool_7x7", "none"), (), True),
    ):
        add_enhancers(
            network,
            example,
            re.escape(f"blocks.{block}.bn2"),
            candidates=candidates,
            extra_candidates=extras,
            count_include_pad=counted,
        )
    for module in network.modules():
        if isinstance(module, MetaPool2d):
            nn.init.normal_(module.alpha)
    return _calibrated(network, (3, image_size, image_size))


def _calibrated(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """In eval mode, each norm as of noise; none divides by next to nothing."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(32, *shape, generator=torch.Generator().manual_seed(0)))
    for norm in norms:
        norm.running_var += 0.3 * norm.running_var.mean()
    return network.eval()


def images(batch: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Noise, and what runtimes may treat in ways of their own."""
    noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
    return {
        "noise": noise,
        "zeros": torch.zeros_like(noise),
        "large": 1e4 * noise,
        "ties": (3 * noise).clamp(0, 6).round(),  # of ReLU6, as after many a convolution
        "negative": -1 - noise.abs(),  # padding would win
    }


def truth(network: nn.Module, batch: Tensor) -> Tensor:
    """By the definition, in float64."""
    with torch.inference_mode():
        out: Tensor = copy.deepcopy(network).double()(batch.double())
    return out
