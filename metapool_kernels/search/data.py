"""Images and how they are divided: the weight half, the alpha half, the evaluation split."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from metapool_kernels.search.config import DataConfig
from metapool_kernels.search.errors import UserError

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) in [-1, 1] and their class numbers (N,)."""


@dataclass(frozen=True)
class Data:
    """Labelled images and which of them may be trained on.

    Each index counts within its own dataset; for the digits the two datasets are one.
    """

    train_set: Dataset[Any]
    train_targets: Sequence[int]
    train: Sequence[int]
    evaluation_set: Dataset[Any]
    evaluation_targets: Sequence[int]
    evaluation: Sequence[int]
    classes: Sequence[str]
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Split:
    """Indices of the images that train the weights, that train alpha, and of the evaluation."""

    weight: list[int]
    alpha: list[int]
    evaluation: list[int]


def load_data(config: DataConfig, seed: int) -> Data:
    """Read the images.

    Raises:
        UserError: the folder is not there or not divided into ``train/``, ``val/`` and classes.
    """
    return _digits(config, seed) if config.kind == "digits" else _folder(config)


def _digits(config: DataConfig, seed: int) -> Data:
    images, targets = load_digits(return_X_y=True)
    small = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    size = (config.image_size, config.image_size)
    large = F.interpolate(small, size, mode="bilinear", align_corners=False)
    dataset = TensorDataset(large / 8 - 1, torch.from_numpy(targets))
    train, evaluation = train_test_split(
        np.arange(len(targets)), test_size=config.holdout, random_state=seed, stratify=targets
    )
    labels = targets.tolist()
    return Data(
        train_set=dataset,
        train_targets=labels,
        train=train.tolist(),
        evaluation_set=dataset,
        evaluation_targets=labels,
        evaluation=evaluation.tolist(),
        classes=[str(digit) for digit in range(10)],
        image_shape=(1, *size),
    )


def _folder(config: DataConfig) -> Data:
    if config.root is None:
        raise UserError("data.kind is folder and data.root is not set; give the folder")
    root = Path(config.root)
    transform = transforms.Compose(
        [
            transforms.Resize(config.image_size),
            transforms.CenterCrop(config.image_size),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    try:
        train_set, val_set = (ImageFolder(str(root / part), transform) for part in ("train", "val"))
    except OSError as error:
        raise UserError(
            f"data.root {str(root)!r} is no folder of images: {error}; "
            "it should hold train/CLASS/*.png and val/CLASS/*.png"
        ) from error
    if train_set.classes != val_set.classes:
        odd = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise UserError(f"train/ and val/ in {str(root)!r} differ in the classes {odd}")
    return Data(
        train_set=train_set,
        train_targets=train_set.targets,
        train=range(len(train_set)),
        evaluation_set=val_set,
        evaluation_targets=val_set.targets,
        evaluation=range(len(val_set)),
        classes=train_set.classes,
        image_shape=(3, config.image_size, config.image_size),
    )


def split_data(data: Data, alpha_half: float, seed: int) -> Split:
    """Cut the training images in two at random; ``alpha_half`` is the share of alpha.

    Raises:
        UserError: one of the two would be empty.
    """
    order = np.random.default_rng(seed).permutation(np.asarray(data.train)).tolist()
    cut = round(len(order) * alpha_half)
    if not 0 < cut < len(order):
        raise UserError(
            f"search.alpha_half {alpha_half} of {len(order)} training images leaves one half empty"
        )
    return Split(sorted(order[cut:]), sorted(order[:cut]), list(data.evaluation))


def split_warnings(data: Data, split: Split) -> list[str]:
    """What is suspicious about a split: images in two parts, classes missing in one."""
    found = []
    overlaps = {"the weight half and the alpha half": set(split.weight) & set(split.alpha)}
    if data.train_set is data.evaluation_set:
        trained_on = set(split.weight) | set(split.alpha)
        overlaps["training and evaluation"] = trained_on & set(split.evaluation)
    for pair, images in overlaps.items():
        if images:
            found.append(f"{pair} overlap in {len(images)} images; the choices may overfit")
    for part, indices, targets in (
        ("weight half", split.weight, data.train_targets),
        ("alpha half", split.alpha, data.train_targets),
        ("evaluation split", split.evaluation, data.evaluation_targets),
    ):
        present = {targets[i] for i in indices}
        missing = [name for number, name in enumerate(data.classes) if number not in present]
        if missing:
            found.append(f"the {part} has no image of class {', '.join(missing)}")
    return found


class CyclingSampler(Sampler[int]):
    """Endless positions 0 to size - 1: one permutation after the other.

    The order depends on ``seed`` and on nothing else, so ``start`` (positions already taken) is
    all that a resumed run needs to go on in the same order.
    """

    def __init__(self, size: int, seed: int, start: int) -> None:
        self.size = size
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[int]:
        cycle, offset = divmod(self.start, self.size)
        while True:
            order = np.random.default_rng([self.seed, cycle]).permutation(self.size)
            yield from order[offset:].tolist()
            cycle, offset = cycle + 1, 0


def training_batches(
    dataset: Dataset[Any], indices: Sequence[int], config: DataConfig, seed: int, start_step: int
) -> Iterator[Batch]:
    """Endless full batches of the images at ``indices``, from step ``start_step`` on."""
    sampler = CyclingSampler(len(indices), seed, start_step * config.batch_size)
    return iter(
        DataLoader(
            Subset(dataset, indices),
            batch_size=config.batch_size,
            sampler=sampler,
            num_workers=config.workers,
            # Its own generator: otherwise making the iterator would draw from the global one.
            generator=torch.Generator(),
        )
    )


def evaluation_batches(
    dataset: Dataset[Any], indices: Sequence[int], config: DataConfig
) -> DataLoader[Batch]:
    """Every image at ``indices`` once, in order."""
    subset = Subset(dataset, indices)
    return DataLoader(subset, batch_size=config.batch_size, num_workers=config.workers)


def steps_per_epoch(indices: Sequence[int], config: DataConfig) -> int:
    """Steps after which each image has been seen once."""
    return math.ceil(len(indices) / int(config.batch_size))
