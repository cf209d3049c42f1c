"""Which image trains what."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from metapool_kernels.search.config import DataConfig
from metapool_kernels.search.data import (
    CyclingSampler,
    Split,
    load_data,
    split_data,
    split_warnings,
    training_batches,
)
from metapool_kernels.search.errors import UserError


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("alpha_half", [0.5, 0.3])
def test_the_three_parts_of_the_digits_are_disjoint_and_complete(
    seed: int, alpha_half: float
) -> None:
    data = load_data(DataConfig(), seed)
    split = split_data(data, alpha_half, seed)
    everything = split.weight + split.alpha + split.evaluation
    assert sorted(everything) == list(range(1797))
    assert len(split.alpha) == pytest.approx(alpha_half * 1437, abs=1)
    assert split_warnings(data, split) == []


def test_the_split_depends_on_the_seed() -> None:
    data = load_data(DataConfig(), 0)
    assert split_data(data, 0.5, 0) == split_data(data, 0.5, 0)
    assert split_data(data, 0.5, 0) != split_data(data, 0.5, 1)


def test_digits_are_enlarged_to_one_channel_from_minus_one_to_one() -> None:
    data = load_data(DataConfig(image_size=24), 0)
    images, target = data.train_set[5]
    assert images.shape == data.image_shape == (1, 24, 24)
    assert int(target) == data.train_targets[5]
    stack = torch.stack([data.train_set[i][0] for i in range(200)])
    assert stack.min() == -1 and 0.9 < stack.max() <= 1


def test_every_warning_about_a_split() -> None:
    data = load_data(DataConfig(), 0)
    split = split_data(data, 0.5, 0)
    zeros = {i for i in split.alpha if data.train_targets[i] == 0}
    odd = Split(
        weight=[*split.weight, split.alpha[1], split.evaluation[0]],
        alpha=[i for i in split.alpha if i not in zeros] + [split.alpha[1]],
        evaluation=split.evaluation,
    )
    found = split_warnings(data, odd)
    assert "weight half and the alpha half overlap in 1 images" in found[0]
    assert "training and evaluation overlap in 1 images" in found[1]
    assert found[2] == "the alpha half has no image of class 0"
    assert len(found) == 3


def test_equal_numbers_in_two_folders_are_no_overlap() -> None:
    data = load_data(DataConfig(), 0)
    apart = replace(data, evaluation_set=torch.utils.data.Subset(data.train_set, range(1797)))
    everything = list(range(1797))
    split = Split(everything[::2], everything[1::2], everything)
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
    data = load_data(config, 0)
    indices = [3, 8, 20, 21, 22]
    before = torch.get_rng_state()
    images, _ = next(training_batches(data.train_set, indices, config, seed=0, start_step=2))
    assert torch.equal(torch.get_rng_state(), before)
    allowed = [data.train_set[i][0] for i in indices]
    assert all(any(torch.equal(image, other) for other in allowed) for image in images)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 6), ("val", 2)):
        for name, shade in (("dark", 0), ("light", 255)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 12), (shade,) * 3).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_a_folder_trains_on_train_and_is_evaluated_on_val(folder: Path) -> None:
    data = load_data(DataConfig(kind="folder", root=str(folder), image_size=8), 0)
    assert (len(data.train), len(data.evaluation)) == (12, 4)
    assert list(data.classes) == ["dark", "light"]
    image, target = data.train_set[11]
    assert (image.shape, target) == ((3, 8, 8), 1)
    assert torch.equal(image, torch.ones(3, 8, 8))
    assert split_warnings(data, split_data(data, 0.5, 0)) == []


def test_a_class_missing_in_val_is_refused(folder: Path) -> None:
    for image in (folder / "val" / "light").iterdir():
        image.unlink()
    (folder / "val" / "light").rmdir()
    with pytest.raises(UserError, match=r"differ in the classes \['light'\]"):
        load_data(DataConfig(kind="folder", root=str(folder)), 0)


def test_a_half_without_images_is_refused() -> None:
    data = load_data(DataConfig(holdout=0.99), 0)
    with pytest.raises(UserError, match="leaves one half empty"):
        split_data(data, 0.01, 0)
