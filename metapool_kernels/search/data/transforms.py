"""From an image to the tensor that a network takes, varied at random for training."""

from typing import Any

from timm.data.transforms_factory import create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from metapool_kernels.search.data.images import one_line
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import DataConfig

MEAN = STD = 0.5
"""Of every channel: pixels from 0 to 1 become numbers from -1 to 1."""


def evaluation_transform(config: DataConfig, mode: str) -> transforms.Compose:
    """Resize, cut out the middle, normalise."""
    return transforms.Compose([*_middle(config), transforms.ToTensor(), _normalize(mode)])


def training_transform(config: DataConfig, mode: str) -> transforms.Compose:
    """As :func:`evaluation_transform`, varied at random as ``data.augment`` asks for.

    Raises:
        UserError: timm does not know the policy.
    """
    augment = config.augment
    channels = len(mode)
    no_jitter: Any = None  # timm's annotation leaves out that this switches it off
    try:
        resized, policy, final = create_transform(
            config.image_size,
            is_training=True,
            hflip=0.0,
            color_jitter=no_jitter,
            auto_augment=augment.policy,
            mean=(MEAN,) * channels,
            std=(STD,) * channels,
            re_prob=augment.erase,
            separate=True,
        )
    except (AssertionError, LookupError, ValueError, TypeError) as error:
        raise UserError(
            f"data.augment.policy {augment.policy!r} is none of timm's: {one_line(error)}"
        ) from error
    crop = {
        "none": _middle(config),
        "pad": [
            *_middle(config),
            transforms.RandomCrop(config.image_size, padding=config.image_size // 8),
        ],
        "resized": [resized],
    }[augment.crop]
    return transforms.Compose([*crop, transforms.RandomHorizontalFlip(augment.flip), policy, final])


def _middle(config: DataConfig) -> list[Any]:
    size = config.image_size
    return [transforms.Resize(size, InterpolationMode.BILINEAR), transforms.CenterCrop(size)]


def _normalize(mode: str) -> transforms.Normalize:
    return transforms.Normalize((MEAN,) * len(mode), (STD,) * len(mode))
