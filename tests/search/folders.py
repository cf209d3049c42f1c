"""Small folders of real image files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

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
