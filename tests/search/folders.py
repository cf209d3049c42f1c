"""Small folders of real image files, and how to load them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.data.splits import Data
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import Config, DataConfig

FORMATS = ("png", "jpg")


def make_image_folder(
    folder: Path,
    classes: int = 3,
    *,
    train: int = 8,
    val: int = 4,
    sizes: Sequence[tuple[int, int]] = ((24, 20), (20, 28)),
    seed: int = 0,
    parts: tuple[str, str] = ("train", "val"),
) -> Path:
    """Fill ``folder`` with ``train/CLASS/*`` and ``val/CLASS/*``, PNG and JPEG in turn.

    Each class is a grating of its own direction, period and colour, at random phases, under
    noise: easy to learn, and no two images are equal.

    Args:
        folder: where to.
        classes: how many there are, named ``class_0`` and so on.
        train: images of each class to train on.
        val: images of each class to evaluate on.
        sizes: widths and heights, in turn.
        seed: of phases and noise.
        parts: names of the two folders.

    Returns:
        ``folder``.
    """
    draw = np.random.default_rng(seed)
    for part, count in zip(parts, (train, val), strict=True):
        for number in range(classes):
            inside = folder / part / f"class_{number}"
            inside.mkdir(parents=True)
            for i in range(count):
                image = _texture(number, classes, sizes[i % len(sizes)], draw)
                image.save(inside / f"{i:03}.{FORMATS[i % len(FORMATS)]}")
    return folder


def _texture(
    number: int, classes: int, size: tuple[int, int], draw: np.random.Generator
) -> Image.Image:
    width, height = size
    y, x = np.mgrid[:height, :width]
    angle = np.pi * number / classes
    period = 4 + 2 * (number % 3)
    along = x * np.cos(angle) + y * np.sin(angle)
    wave = np.sin(2 * np.pi * (along / period + draw.uniform()))
    colour = 0.6 + 0.4 * np.cos(angle + np.array([0, 2, 4]))
    pixels = 128 + 90 * wave[..., None] * colour + draw.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def load(root: Path | None, **settings: Any) -> Data:
    chosen = {"kind": "folder", "image_size": 8} | settings
    root_given = None if root is None else str(root)
    return load_data(Config(output="", data=DataConfig(root=root_given, **chosen)))


def refusal(root: Path | None, **settings: Any) -> str:
    """The message, which must be one line."""
    with pytest.raises(UserError) as caught:
        load(root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def two_classes(root: Path, *images: Image.Image) -> Path:
    """The images as PNG in one class, and the first one alone in the other and in ``val/``."""
    for place in ("train/b", "val/a", "val/b"):
        save(images[0], root / place / "only.png")
    for number, image in enumerate(images):
        save(image, root / "train" / "a" / f"{number}.png")
    return root


def scaled(pixels: "np.ndarray[Any, Any]") -> torch.Tensor:
    """As networks see them: from 0 to 255 becomes from -1 to 1."""
    return torch.from_numpy(pixels).float().div(255).sub(0.5).div(0.5)


def plain(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (12, 10), colour)
