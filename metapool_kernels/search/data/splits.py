"""Images and how they are divided: the weight half, the alpha half, the evaluation split."""

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Sampler,
    SequentialSampler,
    default_collate,
)

from metapool_kernels.search.data.images import files_of
from metapool_kernels.search.errors import OwnError, UserError
from metapool_kernels.search.machine.interrupts import kept_from_children
from metapool_kernels.search.settings.config import Config, DataConfig

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) in [-1, 1] and their class numbers (N,)."""


@dataclass(frozen=True)
class Data:
    """Labelled images and which of them may be trained on.

    Each index counts within its own dataset; for the digits the two datasets are one.
    ``contents`` are digests of the training and the evaluation files, see inspection.py;
    ``warnings`` say what is doubtful.
    """

    train_set: Dataset[Any]
    train_targets: Sequence[int]
    train: Sequence[int]
    evaluation_set: Dataset[Any]
    evaluation_targets: Sequence[int]
    evaluation: Sequence[int]
    classes: Sequence[str]
    image_shape: tuple[int, int, int]
    contents: tuple[str, str] = ("", "")
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Indices of the images that train the weights, that train alpha, and of the evaluation.

    The fingerprints are those of the images that they were made for.
    """

    weight: list[int]
    alpha: list[int]
    evaluation: list[int]
    fingerprint: str
    evaluation_fingerprint: str = ""

    def check(self, data: Data) -> None:
        """Refuse to train on other images than these indices were made for.

        Raises:
            UserError: contents, names or classes of images are others, or there are more or
                fewer, or an index is not that of an image.
        """
        if fingerprint(data) != self.fingerprint:
            raise UserError(
                "the images are not those that the search was started with: their number, names, "
                "contents or classes have changed since; bring them back or search again"
            )
        known = [(self.weight, data.train), (self.alpha, data.train)]
        if not self.differs_in_evaluation(data):
            known.append((self.evaluation, data.evaluation))
        for part, indices in known:
            if not part or not set(part) <= set(indices):
                raise UserError(
                    "the split is damaged: it names images that there are not; search again"
                )

    def differs_in_evaluation(self, data: Data) -> bool:
        """Whether the images for evaluation have changed, which no training can tell."""
        return _fingerprint(data, evaluation=True) != self.evaluation_fingerprint


def fingerprint(data: Data) -> str:
    """A number for classes, labels and, where there are files, names and contents to train on."""
    return _fingerprint(data, evaluation=False)


def _fingerprint(data: Data, *, evaluation: bool) -> str:
    dataset, targets = (
        (data.evaluation_set, data.evaluation_targets)
        if evaluation
        else (data.train_set, data.train_targets)
    )
    names = [Path(path).name for path in files_of(getattr(dataset, "images", None))]
    facts = [list(data.classes), list(targets), names, data.contents[evaluation]]
    return sha256(json.dumps(facts).encode()).hexdigest()


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
    return Split(
        sorted(order[cut:]),
        sorted(order[:cut]),
        list(data.evaluation),
        fingerprint(data),
        _fingerprint(data, evaluation=True),
    )


def image_settings(config: Config) -> list[str]:
    """The settings that decide which images there are and how they are labelled."""
    images = ("kind", "name", "rgb", "image_size", "holdout", "planted")
    names = ["seed", *(f"data.{name}" for name in images)]
    if config.data.kind == "planted":
        # From these its teacher is made.
        teacher = ("name", "arguments", "insert_after", "insert_after_type", "candidates")
        names += [f"model.{name}" for name in (*teacher, "count_include_pad", "candidate_norm")]
    return names


def split_warnings(data: Data, split: Split) -> list[str]:
    """What is suspicious about images and split: images in two parts, classes missing in one."""
    found = list(data.warnings)
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


@dataclass(frozen=True)
class _Place:
    """Where a batch comes from: positions among the images, and a seed for how they are varied."""

    positions: Sequence[int]
    seed: int


class _BatchesOfRank(Sampler[_Place]):
    """Batch ``step * world + rank`` of the endless positions, for one step after the other.

    So the processes together see what one would with batches ``world`` times as large. The seeds
    follow from that of the epoch and the step, and so not from which process loads the batch.
    """

    def __init__(
        self, positions: CyclingSampler, batch_size: int, rank: int, world: int, epoch_seed: int
    ) -> None:
        self.positions = positions
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.epoch_seed = epoch_seed

    def __iter__(self) -> Iterator[_Place]:
        positions = iter(self.positions)
        first = self.rank * self.batch_size
        for step in count():
            of_all = list(islice(positions, self.batch_size * self.world))
            (seed,) = np.random.SeedSequence([self.epoch_seed, step]).generate_state(1).tolist()
            yield _Place(of_all[first : first + self.batch_size], seed)


class _Part(Dataset[Any]):
    """The images at ``indices``, a batch at a time.

    An error that a worker process raises would arrive with the worker's traceback as its text.
    A :class:`UserError` is therefore handed over instead of a batch, and raised by
    :func:`_batches`.
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, place: _Place | Sequence[int]) -> list[Any] | UserError:
        if isinstance(place, _Place):
            with _drawing(place.seed):
                return self.__getitems__(place.positions)
        try:
            return [self.dataset[self.indices[position]] for position in place]
        except UserError as error:
            return error


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Let all random variations of images follow from ``seed``; afterwards all is as before.

    Those of timm draw from Python's and NumPy's generators, those of torchvision from PyTorch's.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs' too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _collate(samples: list[Any] | UserError) -> Any:
    return samples if isinstance(samples, UserError) else default_collate(samples)


def _batches(part: _Part, batch_sampler: Iterable[Any], workers: int) -> Iterator[Batch]:
    # Dropping the loader's iterator ends its processes: it lives as long as this one does.
    loader = DataLoader(
        part,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Its own: otherwise the loader would draw from the global one.
        generator=torch.Generator(),
    )
    with kept_from_children():
        iterator = iter(loader)
    for batch in iterator:
        if isinstance(batch, UserError):
            raise OwnError(str(batch))
        images, targets = batch
        yield images, targets


def training_batches(
    dataset: Dataset[Any],
    indices: Sequence[int],
    config: DataConfig,
    seed: int,
    start_step: int,
    *,
    epoch_seed: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Endless full batches of the images at ``indices``, for one of several processes.

    Args:
        dataset: the images.
        indices: which of them.
        config: size of a batch, number of workers.
        seed: of the order, the same in all processes.
        start_step: batches that this process has taken already.
        epoch_seed: of the random variations, however many workers make them.
        rank: number of this process.
        world: number of processes.

    Raises:
        UserError: there are fewer images than processes; and while iterating, an image is
            unreadable.
    """
    check_share(indices, world)
    taken = start_step * world * config.batch_size
    positions = CyclingSampler(len(indices), seed, taken)
    sampler = _BatchesOfRank(positions, config.batch_size, rank, world, epoch_seed)
    return _batches(_Part(dataset, indices), sampler, config.workers)


def evaluation_batches(
    dataset: Dataset[Any],
    indices: Sequence[int],
    config: DataConfig,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Every image at ``indices`` once over all processes, in order.

    Raises:
        UserError: while iterating, an image is unreadable.
    """
    part = _Part(dataset, indices[rank::world])
    sampler = BatchSampler(SequentialSampler(part), config.batch_size, drop_last=False)
    return _batches(part, sampler, config.workers)


def check_share(indices: Sequence[int], world: int) -> None:
    """Refuse to divide images among more processes than there are images.

    Raises:
        UserError: it is so.
    """
    if world > len(indices):
        raise UserError(
            f"{world} processes cannot share {len(indices)} images; start fewer processes"
        )


def steps_per_epoch(indices: Sequence[int], config: DataConfig, world: int = 1) -> int:
    """Steps of the optimizer that take at least as many images as there are.

    What is left of the last batch is the beginning of the next pass.
    """
    return math.ceil(len(indices) / int(config.batch_size * world * config.accumulate))
