"""Data that would make a result worthless are noticed before anything is trained."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metapool_kernels.search.cli import main
from metapool_kernels.search.data import inspection
from metapool_kernels.search.data.inspection import load_inspected
from metapool_kernels.search.data.splits import Data, split_data, split_warnings
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.machine.processes import make_accelerator
from metapool_kernels.search.settings.config import Config, DataConfig
from tests.search.folders import load, make_image_folder, plain, refusal, save
from tests.search.runs import options


def inspected(root: Path, kind: str = "folder", workers: int = 0) -> Data:
    data = DataConfig(
        kind=kind,  # type: ignore[arg-type]
        name="folder",
        root=str(root),
        image_size=8,
        workers=workers,
    )
    config = Config(output="", data=data)
    return load_inspected(config, make_accelerator(config))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("workers", [0, 1])
def test_every_damaged_image_is_named_before_anything_begins(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_image_folder(tmp_path / "images", classes=2)
    damaged = [root / "train/class_1/004.png", root / "val/class_0/001.jpg"]
    for path in damaged:
        cut(path)
    changes = {"data__kind": "folder", "data__root": root, "data__workers": workers}
    assert main(["search", *options(tmp_path / "run", **changes)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("metapool: 2 images cannot be used: image ")
    assert all(str(path) in line for path in damaged)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["folder", "timm"])
def test_of_many_damaged_images_ten_are_named(kind: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path)
    for path in list((root / "train" / "class_2").iterdir()) + list(root.glob("val/*/002.png")):
        cut(path)
    cut(root / "val" / "class_1" / "001.jpg")
    with pytest.raises(UserError, match=r"^12 images cannot be used: .*; and 2 more$") as refused:
        inspected(root, kind)
    assert str(refused.value).count("cannot be read") == 10


def test_an_image_that_does_not_fit_the_others_is_named_too(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path)
    save(plain("I", 70000), root / "val" / "class_0" / "odd.tif")
    with pytest.raises(UserError, match=r"odd\.tif' cannot be used: it has pixels of 32 bits"):
        inspected(root)


def link(root: Path) -> None:
    (root / "val").symlink_to(root / "train")


def copy(root: Path) -> None:
    shutil.copytree(root / "train", root / "val")


@pytest.mark.parametrize("make", [link, copy])
def test_evaluation_on_what_is_trained_on_is_refused(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    root = make_image_folder(tmp_path)
    shutil.rmtree(root / "val")
    make(root)
    with pytest.raises(UserError, match=r"holds the same images as .* by a link or as copies"):
        inspected(root)


def test_copies_are_counted(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, classes=3, train=8, val=4)
    assert inspected(root).warnings == ()
    one = root / "train" / "class_0" / "000.png"
    shutil.copy(one, root / "val" / "class_0" / "again.png")
    shutil.copy(one, root / "train" / "class_0" / "again.png")
    shutil.copy(one, root / "train" / "class_2" / "elsewhere.png")
    data = inspected(root)
    known, copies, classes = data.warnings
    assert known.startswith("1 of 13 images for evaluation are also trained on, as copies")
    assert copies.startswith("2 of 26 training images are copies of others")
    assert classes == "1 images are in more than one class, as copies"
    assert split_warnings(data, split_data(data, 0.5, 0)) == list(data.warnings)


def never(*_: object) -> None:
    raise AssertionError("images were looked at")


def test_files_that_have_not_changed_are_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_image_folder(tmp_path / "images")
    shutil.copy(root / "train/class_0/000.png", root / "val/class_0/again.png")
    first = inspected(root)
    monkeypatch.setattr(inspection, "_look", never)
    again = inspected(root)
    assert (again.contents, again.warnings) == (first.contents, first.warnings)
    os.utime(root / "val" / "class_1" / "001.jpg", (1, 1))
    with pytest.raises(AssertionError, match="were looked at"):
        inspected(root)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"contents": ["a"], "warnings": []}', "\0"])
def test_a_damaged_memory_is_not_believed(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_image_folder(tmp_path / "images")
    first = inspected(root)
    (file,) = (tmp_path / "cache" / "metapool_kernels").iterdir()
    file.write_text(content)
    assert inspected(root).contents == first.contents


def test_where_nothing_can_be_remembered_all_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert inspected(make_image_folder(tmp_path)).contents[0]


def test_other_content_under_the_same_names_is_noticed(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    data = inspected(root)
    split = split_data(data, 0.5, 0)
    shutil.copytree(root, tmp_path / "moved")
    split.check(inspected(tmp_path / "moved"))
    assert not split.differs_in_evaluation(inspected(tmp_path / "moved"))

    (root / "val" / "class_1" / "001.jpg").unlink()
    fewer = inspected(root)
    split.check(fewer)
    assert split.differs_in_evaluation(fewer)

    plain("RGB", 7).save(root / "train" / "class_1" / "000.png")
    with pytest.raises(UserError, match="contents or classes have changed since"):
        split.check(inspected(root))


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", ".thumbnails"])
def test_what_is_hidden_is_no_class_and_no_image(hidden: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / ".home" / "images")
    expected = load(root)
    image = root / "train" / "class_0" / "000.png"
    for place in (f"train/{hidden}", f"val/{hidden}", f"train/class_1/{hidden}"):
        (root / place).mkdir()
        shutil.copy(image, root / place / "000-checkpoint.png")
    shutil.copy(image, root / "val" / "class_1" / "._000.png")
    data = load(root)
    assert data.classes == expected.classes
    assert data.train_targets == expected.train_targets
    assert data.evaluation_targets == expected.evaluation_targets
    if hidden != "__MACOSX":
        assert f"has a class {hidden!r}" in refusal(root, kind="timm", name="folder")


def test_folders_one_level_off(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "right")
    for part in ("train", "val"):
        shutil.copytree(tmp_path / "right" / part, tmp_path / "one" / part / "images")
        for name in ("left", "right"):
            shutil.copytree(tmp_path / "right" / part, tmp_path / "two" / part / name)
    said = refusal(tmp_path / "one")
    assert "are in one class, 'images', and there is nothing to tell apart" in said
    (warning,) = load(tmp_path / "two").warnings
    assert "train/left/class_0' count as class 'left'" in warning


@pytest.mark.parametrize("kind", ["folder", "timm"])
def test_files_that_are_not_read_are_counted(kind: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    for name in ("train/class_0/a.HEIC", "train/class_1/deep/b.heic", "train/class_1/c"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    unsaid = ("list.csv", ".DS_Store", "class_0/Thumbs.db", "class_0/.git/config")
    for name in (*(f"val/{name}" for name in unsaid), "val/class_1/d.jpe\n"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    train, val = load(root, kind=kind, name="folder").warnings
    counted = r"files in class folders of .*/{}' are not read, .* images: {}; save images as PNG"
    assert re.match("3 " + counted.format("train", r"'\.heic' \(2\), none \(1\)"), train)
    assert re.match("1 " + counted.format("val", r"'\.jpe\\n' \(1\)"), val)


def test_of_many_extensions_five_are_named(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path)
    for number in range(8):
        for count in range(8 - number):
            (root / "train" / "class_2" / f"{count}.x{number}").touch()
    (warning,) = load(root).warnings
    assert warning.startswith("36 files in class folders")
    assert "'.x0' (8), '.x1' (7), '.x2' (6), '.x3' (5), '.x4' (4), others; " in warning


def photo(path: Path, exif: bytes) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Save an image whose upper half is white, and return how it is stored."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize("kind", ["folder", "timm"])
def test_images_stand_as_the_camera_was_held(kind: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, classes=2)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    for name, exif in (("a", turned.tobytes()), ("b", b"Exif\0\0MM\0*\xff\xff\xff\xff")):
        photo(root / "train" / "class_0" / f"{name}.png", exif)
    data = load(root, kind=kind, name="folder")
    files = [Path(path).name for path, _ in data.train_set.images.samples]  # type: ignore[attr-defined]
    image = data.train_set[files.index("a.png")][0].mean(0)
    assert torch.all(image[:, 5:] == 1) and torch.all(image[:, :3] == -1)
    damaged = data.train_set[files.index("b.png")][0].mean(0)
    assert torch.all(damaged[:3] == 1) and torch.all(damaged[5:] == -1)
