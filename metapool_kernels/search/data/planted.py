"""The planted problem: textures labelled by a teacher whose poolings are known.

A search on it can be right or wrong, layer by layer, which no real data set allows. The teacher
is the network of the search with one pooling in each layer and weights of its own; its answers
are the labels, so the search sees a classification like any other.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from metapool_kernels.search.data.splits import Data
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.networks.backbone import make_backbone
from metapool_kernels.search.networks.norms import measure_norms
from metapool_kernels.search.networks.supernet import OF_CANDIDATES, Supernet, build_supernet
from metapool_kernels.search.settings.config import Config

BANDS = 5
"""Channels of an image, independent of each other; the default depth of the network."""
CLASSES = 10
_LOGIT_STD = 3.0
"""Of the teacher's logits: sharp enough that the label is mostly beyond doubt."""
_CHUNK = 256
_TEACHER, _IMAGES, _WINDOWS, _NORMS, _NOISE = range(5)
"""Streams of random numbers. The teacher's weights must not be those a search begins with."""


class _Block(nn.Module):
    """Takes in one band of the image; both inputs count the same, however many channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, width, 1, bias=False)
        self.maps_norm = nn.BatchNorm2d(width)
        self.band = nn.Conv2d(1, width, 1, bias=False)
        self.band_norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()

    def forward(self, maps: Tensor, band: Tensor) -> Tensor:
        mixed = self.maps_norm(self.maps(maps)) + self.band_norm(self.band(band))
        out: Tensor = self.act(mixed)
        return out


class _TextureNet(nn.Module):
    def __init__(self, num_classes: int, in_chans: int, depth: int, width: int) -> None:
        super().__init__()
        self.bands = in_chans
        channels = [1, *[width] * depth]
        self.blocks = nn.ModuleList([_Block(before, width) for before in channels[:-1]])
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = x[:, :1]
        for number, block in enumerate(self.blocks):
            band = number % self.bands
            maps = block(maps, x[:, band : band + 1])
        # The mean of an average is the same whatever its window; how much is left of the texture
        # is not.
        contrast = (maps.var((2, 3), correction=0) + 1e-2).sqrt()
        out: Tensor = self.head(contrast)
        return out


def texture_net(num_classes: int, in_chans: int, depth: int = BANDS, width: int = 16) -> nn.Module:
    """A network in which nothing mixes pixels but what is put in after ``blocks.I.act``.

    A chain of 1 x 1 convolutions. Block i takes in band i of the image, which therefore passes
    the poolings i, i + 1, ... and no other: each layer has a part of its own in the answer, and
    fresh detail to work on whatever the layers before it have blurred.

    Args:
        num_classes: length of the answer.
        in_chans: bands of the image; beyond that many blocks, they begin again.
        depth: number of blocks.
        width: channels of each block.
    """
    return _TextureNet(num_classes, in_chans, depth, width)


def textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random images of shape (count, BANDS, size, size) in [-1, 1].

    Each band of each image has its own mixture of white noise, two grains of some direction,
    period and bandwidth, and isolated bright and dark spots. The strength of each varies by
    orders of magnitude, so that images differ in what averages of any size leave of them, and
    in how far maxima of any size fill them.
    """
    number = count * BANDS

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(number, 1, 1, generator=generator)

    f_y = torch.fft.fftfreq(size)[:, None]
    f_x = torch.fft.rfftfreq(size)
    gain = uniform(-3, 0).exp().expand(-1, *torch.broadcast_shapes(f_y.shape, f_x.shape))
    for _ in range(2):
        frequency, angle = uniform(-2.8, -0.7).exp(), uniform(0, torch.pi)
        bandwidth, strength = uniform(0.02, 0.08), uniform(-1.5, 1.5).exp()
        at_y, at_x = frequency * angle.sin(), frequency * angle.cos()
        for sign in (1, -1):
            distance = (f_y - sign * at_y) ** 2 + (f_x - sign * at_x) ** 2
            bump = torch.exp(-distance / (2 * bandwidth**2))
            gain = gain + 0.1 * strength / bandwidth * bump
    white = torch.randn(number, size, size, generator=generator)
    field = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=(size, size))
    for sign in (1, -1):
        density, height = 10 ** uniform(-2.7, -0.8), uniform(1, 5)
        spots = torch.rand(number, size, size, generator=generator) < density
        field = field + sign * height * spots
    return torch.tanh(field / 3).reshape(count, BANDS, size, size)


def load_planted(config: Config) -> Data:
    """Textures and the teacher's answers; a quarter as many again for evaluation.

    Raises:
        UserError: as for :func:`teacher_state`.
    """
    teacher, images = _teacher_and_images(config)
    logits = _logits(teacher, images)
    noise = torch.randn(logits.shape, generator=_generator(config.seed, _NOISE))
    targets = (logits + config.data.planted.noise * _LOGIT_STD * noise).argmax(1)
    count = config.data.planted.images
    train, evaluation = slice(count), slice(count, None)
    return Data(
        train_set=TensorDataset(images[train], targets[train]),
        train_targets=targets[train].tolist(),
        train=range(len(targets[train])),
        evaluation_set=TensorDataset(images[evaluation], targets[evaluation]),
        evaluation_targets=targets[evaluation].tolist(),
        evaluation=range(len(targets[evaluation])),
        classes=[str(number) for number in range(CLASSES)],
        image_shape=_image_shape(config),
    )


def teacher_state(config: Config) -> dict[str, Tensor]:
    """The teacher's tensors under the names they have in the supernet, but none of a candidate.

    Raises:
        UserError: as for :func:`planted_windows`, or the network cannot be made, has no place for
            an enhancer or does not end in a linear layer.
    """
    state = _teacher_and_images(config)[0].state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(OF_CANDIDATES)}


def planted_windows(config: Config) -> list[str]:
    """The teacher's candidate in each layer, in the order in which the layers run.

    Raises:
        UserError: ``data.planted.windows`` does not fit the layers or the candidates.
    """
    return [config.model.candidates[k] for k in _positions(config, len(_supernet(config).sites))]


def _positions(config: Config, layers: int) -> list[int]:
    """The teacher's windows as positions among the candidates."""
    candidates, windows = config.model.candidates, config.data.planted.windows
    if windows is None:
        generator = np.random.default_rng([config.seed, _WINDOWS])
        return [int(k) for k in generator.integers(len(candidates), size=layers)]
    if len(windows) != layers or not set(windows) <= set(candidates):
        raise UserError(
            f"data.planted.windows should name one of model.candidates for each of the {layers} "
            f"layers, got {windows}"
        )
    return [candidates.index(window) for window in windows]


def _supernet(config: Config) -> Supernet:
    # Without initial weights: model.weights may ask for those that are made here.
    model = replace(config.model, weights=None)
    backbone = make_backbone(model, _image_shape(config), CLASSES)
    return build_supernet(backbone, model, _seed(config.seed, _TEACHER))


def _teacher_and_images(config: Config) -> tuple[nn.Module, Tensor]:
    supernet = _supernet(config)
    positions = _positions(config, len(supernet.sites))
    for site, position in zip(supernet.sites, positions, strict=True):
        supernet.discretise(site.name, [position])
    count = config.data.planted.images
    generator = _generator(config.seed, _IMAGES)
    images = textures(count + math.ceil(count / 4), config.data.image_size, generator)
    # As the search will hold them: then the answers are the same to the last bit.
    images = images.contiguous(memory_format=torch.channels_last)
    _calibrate(supernet.model, images[:count], _generator(config.seed, _NORMS))
    return supernet.model, images


def _calibrate(teacher: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Make the answers balanced: logits of mean 0 and equal standard deviation on ``images``."""
    linear = [module for module in teacher.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].out_features != CLASSES:
        raise UserError("the teacher of the planted problem needs a network that ends in nn.Linear")
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                # As after training; the initial ones and zeros would be known beforehand.
                module.weight.uniform_(0.7, 1.3, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    measure_norms(images.split(_CHUNK), teacher)
    logits = _logits(teacher, images)
    scale = _LOGIT_STD / logits.std(0)
    with torch.no_grad():
        linear[-1].weight.mul_(scale[:, None])
        linear[-1].bias.sub_(logits.mean(0)).mul_(scale)


def _logits(teacher: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([teacher.eval()(chunk) for chunk in images.split(_CHUNK)])


def _image_shape(config: Config) -> tuple[int, int, int]:
    return (BANDS, config.data.image_size, config.data.image_size)


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, stream))


def _seed(seed: int, stream: int) -> int:
    return int(np.random.default_rng([seed, stream]).integers(2**31))
