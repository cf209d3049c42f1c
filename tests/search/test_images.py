"""What becomes of one image: modes, damage, random variations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import AugmentConfig
from tests.search.folders import load, make_image_folder, plain, refusal, save, scaled, two_classes


def palette(transparent: bool) -> Image.Image:
    image = plain("RGB", (255, 0, 127)).quantize(4)
    if transparent:
        image.info["transparency"] = bytes([128] * 4)
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain("RGBA", (255, 0, 127, 40)), (1, -1, 0)),
        (palette(transparent=False), (1, -1, 0)),
        (palette(transparent=True), (1, -1, 0)),
        (plain("L", 127), (0, 0, 0)),
        (plain("LA", (127, 30)), (0, 0, 0)),
        (plain("1", 1), (1, 1, 1)),
        (Image.fromarray(np.full((10, 12), 127 * 256, np.uint16)), (0, 0, 0)),
    ],
    ids=["RGBA", "P", "P with transparency", "L", "LA", "1", "I;16"],
)
def test_every_mode_becomes_rgb_among_coloured_images(
    image: Image.Image,
    expected: tuple[float, ...],
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    data = load(two_classes(tmp_path, plain("RGB", 0), image))
    found, _ = data.train_set[1]
    assert torch.allclose(found.mean((1, 2)), torch.tensor(expected).float(), atol=0.01)
    assert not recwarn.list


def test_jpeg_with_four_inks_becomes_rgb(tmp_path: Path) -> None:
    two_classes(tmp_path, plain("RGB", 0))
    save(plain("CMYK", (0, 255, 255, 0)), tmp_path / "train" / "a" / "1.jpg")
    red, _ = load(tmp_path).train_set[1]
    assert red[0].min() > 0.9 and red[1:].max() < -0.7


@pytest.mark.parametrize(("rgb", "channels"), [(False, 1), (True, 3)])
def test_gray_images_have_one_channel_or_three_equal_ones(
    rgb: bool, channels: int, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    data = load(two_classes(tmp_path, Image.fromarray(pixels)), rgb=rgb)
    image, _ = data.train_set[0]
    assert data.image_shape == image.shape == (channels, 8, 8)
    assert torch.equal(image, scaled(pixels).expand(channels, 8, 8))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (plain("RGB", 0), "in colour (mode RGB) and the first image is gray; set data.rgb true"),
        (plain("I", 70000), "pixels of 32 bits (mode I)"),
    ],
)
def test_images_that_would_lose_something_are_refused(
    image: Image.Image, said: str, tmp_path: Path
) -> None:
    two_classes(tmp_path, plain("L", 0))
    odd = tmp_path / "train" / "a" / "1.tif"
    save(image, odd)
    data = load(tmp_path)
    with pytest.raises(UserError) as caught:
        data.train_set[1]
    assert str(odd) in str(caught.value) and said in str(caught.value)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "no image": lambda content: b"<html>not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["000.png", "001.jpg"])
@pytest.mark.parametrize("kind", ["folder", "timm"])
def test_a_damaged_image_is_named(kind: str, file: str, damage: str, tmp_path: Path) -> None:
    make_image_folder(tmp_path)
    broken = tmp_path / "train" / "class_1" / file
    broken.write_bytes(DAMAGES[damage](broken.read_bytes()))
    data = load(tmp_path, kind=kind, name="folder")
    with pytest.raises(UserError) as caught:
        data.train_set[8 + int(file[:3])]
    assert str(caught.value).startswith(f"image {str(broken)!r} cannot be read: ")
    assert "\n" not in str(caught.value)
    assert data.train_set[10][1] == 1


def test_the_first_image_is_read_before_a_run_begins(tmp_path: Path) -> None:
    make_image_folder(tmp_path)
    broken = tmp_path / "train" / "class_0" / "000.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert refusal(tmp_path).startswith(f"image {str(broken)!r} cannot be read: ")


def gradient(tmp_path: Path) -> Path:
    """Images in which no two pixels are equal."""
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    return two_classes(tmp_path, Image.fromarray(pixels))


def test_training_images_are_varied_and_evaluation_images_are_not(tmp_path: Path) -> None:
    root = gradient(tmp_path)
    original = load(root).train_set[0][0]
    augments = {
        "flip": AugmentConfig(flip=1.0),
        "pad": AugmentConfig(crop="pad"),
        "resized": AugmentConfig(crop="resized"),
        "policy": AugmentConfig(policy="rand-m9-p1"),
        "erase": AugmentConfig(erase=1.0),
    }
    torch.manual_seed(0)
    varied = {}
    for name, augment in augments.items():
        data = load(root, augment=augment)
        assert torch.equal(data.evaluation_set[0][0], original)
        varied[name] = [data.train_set[0][0] for _ in range(20)]
    assert all(torch.equal(image, original.flip(2)) for image in varied["flip"])
    framed = torch.nn.functional.pad(original, (1, 1, 1, 1), value=-1)
    shifts = [framed[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    which = {
        number
        for image in varied["pad"]
        for number, shift in enumerate(shifts)
        if torch.equal(image, shift)
    }
    assert len(which) > 3
    assert all(any(torch.equal(image, shift) for shift in shifts) for image in varied["pad"])
    for image in varied["erase"]:
        erased = (image == 0).all(0)
        assert erased.any() and torch.equal(image[:, ~erased], original[:, ~erased])
    for name in ("resized", "policy"):
        assert len({image.numpy().tobytes() for image in varied[name]}) > 5


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_gray_images_can_be_varied_too(crop: Any, tmp_path: Path) -> None:
    augment = AugmentConfig(crop=crop, flip=0.5, policy="rand-m9-mstd0.5", erase=0.5)
    data = load(two_classes(tmp_path, plain("L", 90)), augment=augment)
    assert {data.train_set[0][0].shape for _ in range(100)} == {(1, 8, 8)}


def test_a_policy_that_timm_does_not_know(tmp_path: Path) -> None:
    said = refusal(gradient(tmp_path), augment=AugmentConfig(policy="rubbish"))
    assert said == "data.augment.policy 'rubbish' is none of timm's: Unknown AA policy rubbish"
