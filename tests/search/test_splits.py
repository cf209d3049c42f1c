"""Which image trains what, and in which order and process."""

import multiprocessing
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.data.splits import (
    Batch,
    CyclingSampler,
    Data,
    Split,
    evaluation_batches,
    fingerprint,
    split_data,
    split_warnings,
    steps_per_epoch,
    training_batches,
)
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import AugmentConfig, Config, DataConfig
from tests.search.folders import make_image_folder


def digits(config: DataConfig, seed: int) -> Data:
    return load_data(Config(output="", seed=seed, data=config))


class Numbers(Dataset[tuple[int, int]]):
    """Each "image" is its own number."""

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index % 2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("alpha_half", [0.5, 0.3])
def test_the_three_parts_of_the_digits_are_disjoint_and_complete(
    seed: int, alpha_half: float
) -> None:
    data = digits(DataConfig(), seed)
    split = split_data(data, alpha_half, seed)
    everything = split.weight + split.alpha + split.evaluation
    assert sorted(everything) == list(range(1797))
    assert len(split.alpha) == pytest.approx(alpha_half * 1437, abs=1)
    assert split_warnings(data, split) == []


def test_the_split_depends_on_the_seed() -> None:
    data = digits(DataConfig(), 0)
    assert split_data(data, 0.5, 0) == split_data(data, 0.5, 0)
    assert split_data(data, 0.5, 0) != split_data(data, 0.5, 1)


def test_digits_are_enlarged_to_one_channel_from_minus_one_to_one() -> None:
    data = digits(DataConfig(image_size=24), 0)
    images, target = data.train_set[5]
    assert images.shape == data.image_shape == (1, 24, 24)
    assert int(target) == data.train_targets[5]
    stack = torch.stack([data.train_set[i][0] for i in range(200)])
    assert stack.min() == -1 and 0.9 < stack.max() <= 1


def test_every_warning_about_a_split() -> None:
    data = digits(DataConfig(), 0)
    split = split_data(data, 0.5, 0)
    zeros = {i for i in split.alpha if data.train_targets[i] == 0}
    odd = Split(
        weight=[*split.weight, split.alpha[1], split.evaluation[0]],
        alpha=[i for i in split.alpha if i not in zeros] + [split.alpha[1]],
        evaluation=split.evaluation,
        fingerprint=split.fingerprint,
    )
    found = split_warnings(data, odd)
    assert "weight half and the alpha half overlap in 1 images" in found[0]
    assert "training and evaluation overlap in 1 images" in found[1]
    assert found[2] == "the alpha half has no image of class 0"
    assert len(found) == 3


def test_equal_numbers_in_two_folders_are_no_overlap() -> None:
    data = digits(DataConfig(), 0)
    apart = replace(data, evaluation_set=torch.utils.data.Subset(data.train_set, range(1797)))
    everything = list(range(1797))
    split = Split(everything[::2], everything[1::2], everything, fingerprint(data))
    assert split_warnings(apart, split) == []


@pytest.mark.parametrize("start", [0, 3, 7, 23])
def test_the_sampler_visits_all_and_goes_on_anywhere(start: int) -> None:
    order = list(islice(CyclingSampler(7, seed=1, start=0), 35))
    assert all(sorted(order[i : i + 7]) == list(range(7)) for i in range(0, 35, 7))
    assert order[:7] != order[7:14]
    assert list(islice(CyclingSampler(7, seed=1, start=start), 35 - start)) == order[start:]
    assert list(islice(CyclingSampler(7, seed=2, start=0), 35)) != order


def test_batches_come_from_the_given_images_and_leave_the_global_generator() -> None:
    config = DataConfig(batch_size=4)
    data = digits(config, 0)
    indices = [3, 8, 20, 21, 22]
    before = torch.get_rng_state()
    batches = training_batches(data.train_set, indices, config, 0, start_step=2, epoch_seed=0)
    images, _ = next(batches)
    next(iter(evaluation_batches(data.evaluation_set, indices, config)))
    assert torch.equal(torch.get_rng_state(), before)
    allowed = [data.train_set[i][0] for i in indices]
    assert all(any(torch.equal(image, other) for other in allowed) for image in images)


def test_a_half_without_images_is_refused() -> None:
    data = digits(DataConfig(holdout=0.99), 0)
    with pytest.raises(UserError, match="leaves one half empty"):
        split_data(data, 0.01, 0)


def seen(batches: Iterator[Batch], steps: int) -> list[list[int]]:
    return [images.tolist() for images, _ in islice(batches, steps)]


@pytest.mark.parametrize("images", [3, 17, 40])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_together_see_what_one_with_a_larger_batch_sees(images: int, world: int) -> None:
    indices = list(range(100, 100 + images))
    small, large = DataConfig(batch_size=4), DataConfig(batch_size=4 * world)
    alone = seen(training_batches(Numbers(), indices, large, 5, 0, epoch_seed=0), 12)
    each = [
        seen(
            training_batches(Numbers(), indices, small, 5, 0, epoch_seed=r, rank=r, world=world), 12
        )
        for r in range(world)
    ]
    assert [list(chain(*step)) for step in zip(*each, strict=True)] == alone
    assert sorted(list(chain(*alone))[:images]) == indices
    last = training_batches(
        Numbers(), indices, small, 5, 4, epoch_seed=9, rank=world - 1, world=world
    )
    assert seen(last, 8) == each[-1][4:]


@pytest.mark.parametrize("images", [2, 9, 10])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_together_evaluate_each_image_once(images: int, world: int) -> None:
    config = DataConfig(batch_size=4)
    found = []
    for rank in range(world):
        for numbers, _ in evaluation_batches(Numbers(), range(images), config, rank, world):
            assert 0 < len(numbers) <= 4
            found += numbers.tolist()
    assert sorted(found) == list(range(images))


@pytest.mark.parametrize(
    ("images", "batch_size", "accumulate", "world", "steps"),
    [(64, 8, 1, 1, 8), (65, 8, 1, 1, 9), (64, 8, 2, 2, 2), (65, 8, 2, 2, 3), (3, 8, 4, 2, 1)],
)
def test_steps_of_an_epoch(
    images: int, batch_size: int, accumulate: int, world: int, steps: int
) -> None:
    config = DataConfig(batch_size=batch_size, accumulate=accumulate)
    assert steps_per_epoch(range(images), config, world) == steps


@pytest.mark.parametrize(("images", "world"), [(2, 3), (0, 1)])
def test_more_processes_than_images_are_refused(images: int, world: int) -> None:
    with pytest.raises(UserError, match=f"{world} processes cannot share {images} images"):
        training_batches(
            Numbers(), range(images), DataConfig(), 0, 0, epoch_seed=0, rank=0, world=world
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


def varied(folder: Path, workers: int) -> tuple[Data, DataConfig]:
    """Images with every kind of random variation."""
    augment = AugmentConfig(crop="resized", flip=0.5, policy="rand-m9-mstd0.5", erase=0.5)
    config = DataConfig(
        kind="folder",
        root=str(folder),
        image_size=16,
        batch_size=4,
        workers=workers,
        augment=augment,
    )
    return load_data(Config(output="", data=config)), config


def epoch(data: Data, config: DataConfig, number: int, **changes: Any) -> list[Batch]:
    """Six batches of one epoch, begun as a run begins it."""
    epoch_seed = 1000 + number
    random.seed(epoch_seed)
    np.random.seed(epoch_seed)
    torch.manual_seed(epoch_seed)
    options = {"start_step": 6 * number, "epoch_seed": epoch_seed} | changes
    batches = training_batches(data.train_set, data.train, config, 0, **options)
    return list(islice(batches, 6))


@pytest.mark.parametrize("workers", [0, 2])
def test_random_variations_depend_on_the_epoch_alone(folder: Path, workers: int) -> None:
    data, config = varied(folder, workers)
    epoch(data, config, 0)
    after_another = epoch(data, config, 1)
    resumed = epoch(data, config, 1)
    for (images, targets), (again, targets_again) in zip(after_another, resumed, strict=True):
        assert torch.equal(images, again) and torch.equal(targets, targets_again)
    # The same images as in epoch 1, varied otherwise.
    other = epoch(data, config, 2, start_step=6)
    for (images, targets), (changed, same) in zip(after_another, other, strict=True):
        assert torch.equal(targets, same) and not torch.equal(images, changed)


def test_random_variations_do_not_depend_on_the_number_of_workers(folder: Path) -> None:
    alone, *others = (epoch(*varied(folder, workers), 1) for workers in (0, 1, 2))
    for batches in others:
        for (images, targets), (found, same) in zip(alone, batches, strict=True):
            assert torch.equal(images, found) and torch.equal(targets, same)


@pytest.mark.parametrize("workers", [0, 1])
def test_variations_leave_the_generators_of_the_network_alone(folder: Path, workers: int) -> None:
    data, config = varied(folder, workers)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    batches = training_batches(data.train_set, data.train, config, 0, 0, epoch_seed=1)
    assert len(list(islice(batches, 3))) == 3
    after = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_workers_draw_from_nothing_that_the_main_process_has(folder: Path) -> None:
    data, config = varied(folder, 2)
    expected = epoch(data, config, 0)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    batches = training_batches(data.train_set, data.train, config, 0, 0, epoch_seed=1000)
    for (images, _), (found, _) in zip(expected, batches, strict=False):
        assert torch.equal(images, found)
    after = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_workers_end_with_their_iterator(folder: Path) -> None:
    data, config = varied(folder, 2)
    before = set(multiprocessing.active_children())
    batches = training_batches(data.train_set, data.train, config, 0, 0, epoch_seed=0)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del batches
    assert set(multiprocessing.active_children()) == before
    for _ in evaluation_batches(data.evaluation_set, data.evaluation, config):
        break
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_on_one_line(tmp_path: Path, workers: int) -> None:
    make_image_folder(tmp_path)
    data, config = varied(tmp_path, workers)
    broken = tmp_path / "val" / "class_1" / "001.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError) as caught:
        list(evaluation_batches(data.evaluation_set, data.evaluation, config))
    message = str(caught.value)
    assert message.startswith(f"image {str(broken)!r} cannot be read: ")
    assert "truncated" in message.lower() and "\n" not in message and "Traceback" not in message
    del caught
    assert set(multiprocessing.active_children()) == before


def test_data_can_be_sent_to_a_process_that_is_not_forked(folder: Path) -> None:
    data, _ = varied(folder, 0)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    image, _ = data.train_set[3]
    sent = pickle.loads(pickle.dumps(data))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(sent.train_set[3][0], image)
