"""Images and classes from real files of every kind."""

import hashlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets

from metapool_kernels.search.data.datasets import load_data
from metapool_kernels.search.data.splits import split_data, split_warnings
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import Config, DataConfig
from tests.search.folders import load, make_image_folder, plain, refusal, save, scaled


def test_a_folder_trains_on_train_and_is_evaluated_on_val(tmp_path: Path) -> None:
    data = load(make_image_folder(tmp_path, classes=2, train=6, val=2))
    assert (len(data.train), len(data.evaluation)) == (12, 4)
    assert list(data.classes) == ["class_0", "class_1"]
    assert list(data.train_targets) == [0] * 6 + [1] * 6
    image, target = data.train_set[11]
    assert (image.shape, target) == (data.image_shape, 1)
    assert data.image_shape == (3, 8, 8)
    assert split_warnings(data, split_data(data, 0.5, 0)) == []


@pytest.mark.parametrize(("rgb", "channels"), [(False, 1), (True, 3)])
def test_digits_have_one_channel_or_three_equal_ones(rgb: bool, channels: int) -> None:
    data = load(None, kind="digits", rgb=rgb)
    image, _ = data.train_set[7]
    assert data.image_shape == image.shape == (channels, 8, 8)
    assert torch.equal(image, image[:1].expand(channels, 8, 8)) and image.std() > 0


def without(path: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        for inside in sorted((root / path).rglob("*"), reverse=True):
            inside.rmdir() if inside.is_dir() else inside.unlink()
        if path != "val/class_1/":
            (root / path).rmdir()

    return remove


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("."), "is no folder; it should hold train/CLASS/*.png and val/CLASS/*.png"),
        (without("train"), "has no folder train/"),
        (without("val"), "has no folder val/"),
        (without("val/class_1"), "differ in the classes ['class_1']"),
        (without("val/class_1/"), "unusable val/: Found no valid file for the classes class_1"),
        (lambda root: [without(f"train/class_{i}")(root) for i in range(3)], "any class folder"),
    ],
)
def test_a_folder_of_the_wrong_shape(
    change: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    root = make_image_folder(tmp_path / "images")
    change(root)
    assert said in refusal(root)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "folder"}, "data.kind is folder and data.root is not set"),
        ({"kind": "cifar10"}, "data.kind is cifar10 and data.root is not set"),
        ({"kind": "torchvision"}, "data.kind is torchvision and data.name is not set"),
        ({"kind": "timm"}, "data.kind is timm and data.name is not set"),
        ({"kind": "digits", "image_size": 10**6}, "resized to data.image_size 1000000"),
        ({"kind": "timm", "name": "hfds/cifar10"}, "set data.download true to allow it"),
    ],
)
def test_settings_that_do_not_suffice(settings: dict[str, Any], said: str) -> None:
    assert said in refusal(None, **settings)


def test_a_size_that_no_memory_holds(tmp_path: Path) -> None:
    said = refusal(make_image_folder(tmp_path), image_size=10**7)
    assert said.startswith("data.image_size 10000000 makes images of more than")


def idx(array: "np.ndarray[Any, Any]") -> bytes:
    """MNIST's format: a magic number with the number of axes, their lengths, the bytes."""
    shape = np.array([0x0800 + array.ndim, *array.shape], ">i4")
    return shape.tobytes() + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize("rgb", [False, True])
def test_mnist_in_its_own_format(name: str, rgb: bool, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    labels = np.arange(20) % 10
    pixels = draw.integers(0, 256, (20, 28, 28))
    for part, count in (("train", 20), ("t10k", 10)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels[:count]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[:count]))
    data = load(tmp_path, kind="torchvision", name=name, image_size=28, rgb=rgb)
    image, target = data.train_set[13]
    assert (len(data.train), len(data.evaluation), target) == (20, 10, 3)
    assert list(data.train_targets) == labels.tolist() and len(data.classes) == 10
    assert torch.equal(image[0], scaled(pixels[13]))
    assert data.image_shape == image.shape == (3 if rgb else 1, 28, 28)

    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:10] + 1))
    said = refusal(tmp_path, kind="torchvision", name=name)
    assert said == f"torchvision's {name} has labels up to 10 and only 10 classes"

    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(pixels[:10])[:-5])
    assert f"torchvision's {name} cannot be" in refusal(tmp_path, kind="torchvision", name=name)


def dump(content: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_in_its_own_format(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by = getattr(torchvision.datasets, kind.upper())
    folder = tmp_path / made_by.base_folder
    classes = [f"name {i}" for i in range(10)]
    key = "labels" if kind == "cifar10" else "fine_labels"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    batch = {"data": pixels, key: [i % 10 for i in range(20)]}
    files = [
        made_by.meta["filename"],
        *(name for name, _ in made_by.train_list + made_by.test_list),
    ]
    contents = [{made_by.meta["key"]: classes}, *(batch for _ in files[1:])]
    # The real files' checksums are of the real images.
    sums = [
        dump(content, folder / file, monkeypatch)
        for file, content in zip(files, contents, strict=True)
    ]
    monkeypatch.setattr(made_by, "meta", made_by.meta | {"md5": sums[0][1]})
    monkeypatch.setattr(made_by, "train_list", sums[1:-1])
    monkeypatch.setattr(made_by, "test_list", sums[-1:])

    data = load(tmp_path, kind=kind, image_size=32)
    assert list(data.classes) == classes and data.image_shape == (3, 32, 32)
    assert (len(data.train), len(data.evaluation)) == (20 * len(sums[1:-1]), 20)
    image, target = data.evaluation_set[13]
    expected = scaled(pixels[13].reshape(3, 32, 32))
    assert target == 3 and torch.equal(image, expected)

    (folder / files[-1]).write_bytes(b"damaged")
    said = refusal(tmp_path, kind=kind)
    assert f"torchvision's {kind.upper()} cannot be read from {str(tmp_path)!r}" in said
    assert "data.download true" in said


def test_svhn_whose_classes_have_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), np.uint8)
    scipy.io.savemat(tmp_path / "one.mat", {"X": pixels, "y": np.arange(1, 11)[:, None]})
    checksum = hashlib.md5((tmp_path / "one.mat").read_bytes()).hexdigest()
    places = {part: ["", "one.mat", checksum] for part in ("train", "test")}
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", places)
    data = load(tmp_path, kind="torchvision", name="SVHN", image_size=32)
    assert list(data.classes) == [str(i) for i in range(10)]
    image, target = data.train_set[9]
    assert target == 0  # the file calls it 10
    expected = scaled(pixels[..., 9].transpose(2, 0, 1))
    assert torch.equal(image, expected)


@pytest.mark.parametrize(
    ("name", "inside", "parts", "evaluated"),
    [
        ("Country211", "country211", ("train", "valid", "test"), "test"),
        ("Imagenette", "imagenette2", ("train", "val"), "val"),
    ],
)
def test_the_test_split_is_preferred_and_the_other_one_taken(
    name: str, inside: str, parts: tuple[str, ...], evaluated: str, tmp_path: Path
) -> None:
    # Imagenette's classes have the names of ImageNet's.
    classes = ("n01440764", "n02102040") if name == "Imagenette" else ("AD", "AE")
    for shade, part in enumerate(parts):
        for folder in classes:
            suffix = ".JPEG" if name == "Imagenette" else ".jpg"
            image = tmp_path / inside / part / folder / f"1{suffix}"
            image.parent.mkdir(parents=True)
            plain("RGB", (100 * shade,) * 3).save(image, format="JPEG")
    data = load(tmp_path, kind="torchvision", name=name)
    image, _ = data.evaluation_set[0]
    assert image.mean().item() == pytest.approx(200 * parts.index(evaluated) / 255 - 1, abs=0.02)
    assert data.train_set[0][0].max() == -1
    assert list(data.train_targets) == [0, 1]

    if name == "Country211":  # one whose images are read by a loader that can be chosen
        broken = tmp_path / inside / "train" / "AE" / "1.jpg"
        broken.write_bytes(b"")
        with pytest.raises(UserError, match=r"AE/1\.jpg' cannot be read"):
            data.train_set[1]


def test_pets_are_trained_on_trainval(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    lines = ""
    for number, breed in enumerate(("Abyssinian", "great_pyrenees"), 1):
        save(plain("RGB", 0), base / "images" / f"{breed}_1.jpg")
        lines += f"{breed}_1 {number} {number} 1\n"
    (base / "annotations").mkdir()
    for part in ("trainval", "test"):
        (base / "annotations" / f"{part}.txt").write_text(lines)
    data = load(tmp_path, kind="torchvision", name="OxfordIIITPet")
    assert list(data.classes) == ["Abyssinian", "Great Pyrenees"]

    (base / "annotations" / "test.txt").write_text(lines.replace(" 1 1 1", " 0 1 1"))
    said = refusal(tmp_path, kind="torchvision", name="OxfordIIITPet")
    assert "labels other than class numbers from 0 on" in said

    (base / "images" / "great_pyrenees_1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="image 1 of torchvision's OxfordIIITPet cannot be read"):
        data.train_set[1]


def test_labels_that_are_no_class_numbers_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "Kitti" / "raw"
    for part in ("training", "testing"):
        save(plain("RGB", 0), raw / part / "image_2" / "1.png")
    (raw / "training" / "label_2").mkdir()
    (raw / "training" / "label_2" / "1.txt").write_text("Car 0 0 0 1 1 2 2 1 1 1 1 1 1 1\n")
    said = refusal(tmp_path, kind="torchvision", name="Kitti")
    assert "torchvision's Kitti has labels other than class numbers" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mnist", "torchvision.datasets has no 'mnist'; give a class of it"),
        ("utils", "torchvision.datasets has no 'utils'"),
        ("EuroSAT", "takes neither train nor split"),
        ("EMNIST", "Unknown value 'train' for argument split"),
        ("UCF101", "torchvision's UCF101 cannot be read from"),
        ("MNIST", "Dataset not found"),
        ("Flowers102", "data.download true fetches what torchvision can fetch"),
        ("ImageNet", "torchvision's ImageNet cannot be read from"),
    ],
)
def test_torchvision_names_that_do_not_work(name: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, kind="torchvision", name=name)


def test_imagenet_has_its_root_above_its_parts(tmp_path: Path) -> None:
    """Where classes are not the folders that the root holds, none is taken for a nested one."""
    root = make_image_folder(tmp_path, classes=2)
    (root / "val" / "class_0" / "note.txt").touch()
    torch.save(({"class_0": ("tench",), "class_1": ("shark",)}, []), root / "meta.bin")
    data = load(root, kind="torchvision", name="ImageNet")
    assert data.classes == ["tench", "shark"] and data.warnings == ()


@pytest.mark.parametrize("evaluation", ["val", "validation"])
def test_timm_by_name_on_a_folder(evaluation: str, tmp_path: Path) -> None:
    make_image_folder(tmp_path, parts=("train", evaluation))
    by_timm = load(tmp_path, kind="timm", name="folder")
    assert (len(by_timm.train), len(by_timm.evaluation)) == (24, 12)
    assert list(by_timm.classes) == [f"class_{i}" for i in range(3)]
    (tmp_path / evaluation).rename(tmp_path / "val")
    for number, (image, target) in enumerate(load(tmp_path).train_set):  # type: ignore[arg-type]
        found, found_target = by_timm.train_set[number]
        assert target == found_target and torch.equal(image, found)


@pytest.mark.parametrize("missing", ["train", "val"])
@pytest.mark.parametrize("name", ["folder", "torch/folder"])
def test_timm_may_not_take_the_whole_folder_for_a_part(
    missing: str, name: str, tmp_path: Path
) -> None:
    make_image_folder(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    assert "is not divided" in refusal(tmp_path, kind="timm", name=name)


def test_timm_numbers_classes_in_each_part_alone(tmp_path: Path) -> None:
    make_image_folder(tmp_path)
    without("val/class_0")(tmp_path)
    assert "differ in the classes ['class_0']" in refusal(tmp_path, kind="timm", name="folder")


@pytest.mark.parametrize(
    ("name", "root", "said"),
    [
        ("folder", "nowhere", "is no folder, and timm takes 'folder' for a folder of images"),
        ("torch/nothing", "", "Unknown torchvision dataset nothing"),
        ("torch/cifar10", "", "Dataset not found"),
    ],
)
def test_timm_names_that_do_not_work(name: str, root: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path / root, kind="timm", name=name)


def test_a_stream_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("never read")

    monkeypatch.setattr(
        "metapool_kernels.search.data.datasets.create_dataset", lambda *_, **options: Stream()
    )
    said = refusal(tmp_path, kind="timm", name="hfids/cifar10", download=True)
    assert "is a stream, which can neither be shuffled nor cut in two" in said


def test_planted_images_come_from_the_planted_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = ModuleType("planted")
    planted.load_planted = lambda config: (config, "planted")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "metapool_kernels.search.data.planted", planted)
    config = Config(output="", data=DataConfig(kind="planted"))
    assert load_data(config) == (config, "planted")
