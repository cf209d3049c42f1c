"""A shallow network, for images on which a short receptive field is what holds it back."""

from torch import Tensor, nn


class _Block(nn.Module):
    """A depthwise-separable block: its depthwise convolution alone sees beyond one pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
        )
        self.pointwise = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class _ShallowNet(nn.Module):
    def __init__(self, num_classes: int, in_chans: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
        )
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def shallow_net(num_classes: int, in_chans: int, width: int = 24, depth: int = 2) -> nn.Module:
    """A 3x3 convolution of stride 2, depthwise-separable blocks, the mean over the map, a layer.

    Its units see 3 + 4 * depth pixels of the image: 11 with two blocks. What two parts of the
    image farther apart than that have to do with each other, it cannot tell, but for what
    enhancers behind ``blocks.I.depthwise`` bring together.

    Args:
        num_classes: length of the answer.
        in_chans: channels of the image.
        width: channels of each map.
        depth: number of blocks.
    """
    return _ShallowNet(num_classes, in_chans, width, depth)
