"""The kinds of ``data.kind``: where images and their classes come from."""

import inspect
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from timm.data.dataset_factory import create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.datasets.folder import is_image_file

from metapool_kernels.search.data.bundled import load_bundled
from metapool_kernels.search.data.images import (
    ImageSet,
    files_of,
    get_image,
    mode_of,
    one_line,
    read_image,
)
from metapool_kernels.search.data.splits import Data
from metapool_kernels.search.data.transforms import evaluation_transform, training_transform
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import Config, DataConfig

_NAMED = 5
"""How many file extensions a warning names."""


@dataclass(frozen=True)
class _Part:
    """The training or the evaluation images: (PIL image, anything) by index, and their labels."""

    images: Any
    targets: list[int]
    classes: list[str] | None
    name: str


def load_data(config: Config) -> Data:
    """The images that ``config.data`` asks for.

    Raises:
        UserError: they are not there, not divided into classes, unreadable, or do not fit the
            other settings of ``config.data``.
    """
    kinds: dict[str, Callable[[], tuple[_Part, _Part]]] = {
        "folder": lambda: _folder(config.data),
        "cifar10": lambda: _torchvision(config.data, "CIFAR10"),
        "cifar100": lambda: _torchvision(config.data, "CIFAR100"),
        "torchvision": lambda: _torchvision(config.data, _name(config.data)),
        "timm": lambda: _timm(config.data, _name(config.data)),
    }
    if config.data.kind in ("digits", "mnist5k"):
        return load_bundled(config.data, config.seed)
    if config.data.kind == "planted":
        from metapool_kernels.search.data.planted import load_planted

        return load_planted(config)
    return _assemble(config.data, *kinds[config.data.kind]())


def _folder(config: DataConfig) -> tuple[_Part, _Part]:
    root = _root(config)
    layout = "it should hold train/CLASS/*.png and val/CLASS/*.png, or other image files"
    if not root.is_dir():
        raise UserError(f"data.root {str(root)!r} is no folder; {layout}")
    parts = []
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise UserError(f"data.root {str(root)!r} has no folder {name}/; {layout}")
        try:
            images = _VisibleImages(str(root / name))
        except OSError as error:
            raise UserError(
                f"data.root {str(root)!r} has an unusable {name}/: {one_line(error)}; {layout}"
            ) from error
        parts.append(_Part(images, images.targets, images.classes, str(root / name)))
    return parts[0], parts[1]


class _VisibleImages(ImageFolder):  # type: ignore[misc]
    """A folder of images without what is hidden in it, such as ``.ipynb_checkpoints``."""

    def __init__(self, root: str) -> None:
        super().__init__(root, loader=read_image, is_valid_file=self._is_visible_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(
            entry.name for entry in os.scandir(directory) if entry.is_dir() and _shows(entry.name)
        )
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: number for number, name in enumerate(names)}

    def _is_visible_image(self, path: str) -> bool:
        parts = Path(path).relative_to(self.root).parts
        return all(map(_shows, parts)) and is_image_file(path)


_CLUTTER = ("__macosx", "thumbs.db", "desktop.ini")
"""What systems put into folders that one looks at, besides names that begin with a dot."""


def _shows(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _CLUTTER


def _unread(images: Any) -> list[str]:
    """A warning where class folders hold files that are not taken for images, by their names."""
    read = set(files_of(images))
    if not (isinstance(images, (_VisibleImages, _TimmImages)) and read):
        return []
    root = images.root
    suffixes: Counter[str] = Counter()
    for folder, _, names in os.walk(root, followlinks=True):
        inside = Path(folder).relative_to(root).parts
        if inside and all(map(_shows, inside)):
            others = (name for name in names if os.path.join(folder, name) not in read)
            suffixes.update(Path(name).suffix.lower() for name in others if _shows(name))
    if not suffixes:
        return []
    kinds = [f"{repr(suffix) if suffix else 'none'} ({n})" for suffix, n in suffixes.most_common()]
    if len(kinds) > _NAMED:
        kinds[_NAMED:] = ["others"]
    return [
        f"{suffixes.total()} files in class folders of {str(root)!r} are not read, as their "
        f"extensions are none of those of images: {', '.join(kinds)}; save images as PNG or JPEG"
    ]


def _nested(images: Any) -> list[str]:
    """A warning where classes have folders of their own, and so may not be the classes."""
    if not isinstance(images, _VisibleImages):  # others may have a root above their folder
        return []
    places = [Path(path).relative_to(images.root).parts for path, _ in images.samples]
    deep = next((parts for parts in places if len(parts) > 2), None)
    if deep is None:
        return []
    return [
        f"images in {os.path.join(images.root, *deep[:-1])!r} count as class {deep[0]!r}; classes "
        "are the folders that train/ and val/ hold themselves"
    ]


def _torchvision(config: DataConfig, name: str) -> tuple[_Part, _Part]:
    made_by = getattr(torchvision.datasets, name, None)
    if not (inspect.isclass(made_by) and issubclass(made_by, VisionDataset)):
        raise UserError(f"torchvision.datasets has no {name!r}; give a class of it, such as SVHN")
    accepted = inspect.signature(made_by).parameters
    arguments: dict[str, Any] = {"root": str(_root(config))}
    if config.download:
        arguments["download"] = True
    if "loader" in accepted or issubclass(made_by, ImageFolder):
        arguments["loader"] = read_image
    if "train" in accepted:
        choices: list[list[dict[str, Any]]] = [[{"train": True}], [{"train": False}]]
    elif "split" in accepted:
        choices = [
            [{"split": split} for split in splits]
            for splits in (("train", "trainval"), ("test", "val", "valid"))
        ]
    else:
        raise UserError(
            f"torchvision's {name} is not divided into training and evaluation images: its "
            "constructor takes neither train nor split; take another data.name"
        )
    hint = "" if config.download else "; data.download true fetches what torchvision can fetch"
    parts = [_first_that_works(made_by, arguments, choice, hint) for choice in choices]
    return parts[0], parts[1]


def _first_that_works(
    made_by: Any, arguments: dict[str, Any], choices: Iterable[dict[str, Any]], hint: str
) -> _Part:
    """The first of ``choices`` that the dataset knows and has labels for."""
    name = f"torchvision's {made_by.__name__}"
    refusals = []
    for choice in choices:
        try:
            images = made_by(**arguments, **choice)
        except ValueError as error:  # its way to say that there is no such split
            refusals.append(one_line(error))
            continue
        except Exception as error:  # code of another library, on somebody's files
            root = arguments["root"]
            raise UserError(
                f"{name} cannot be read from {root!r}: {one_line(error)}{hint}"
            ) from error
        try:
            return _Part(images, _targets(images, name), _classes(images), name)
        except UserError as error:
            refusals.append(str(error))
    raise UserError(f"{name} cannot be used with {list(choices)}: {'; '.join(refusals)}")


def _timm(config: DataConfig, name: str) -> tuple[_Part, _Part]:
    prefix = name.partition("/")[0].lower() if "/" in name else ""
    if prefix == "hfds" and not config.download:
        raise UserError(
            f"timm fetches {name!r} by itself if it is missing; set data.download true to allow it"
        )
    root = None if prefix == "hfds" and config.root is None else str(_root(config))
    if prefix not in ("hfds", "torch") and not Path(str(root)).is_dir():
        raise UserError(
            f"data.root {root!r} is no folder, and timm takes {name!r} for a folder of images"
        )
    parts = [
        _timm_part(name, root, splits, config.download)
        for splits in (("train",), ("validation", "test"))
    ]
    shared = _files(parts[0]) & _files(parts[1])
    if shared:
        raise UserError(
            f"data.root {root!r} is not divided: timm finds {min(shared)!r} among the training "
            "images and among those for evaluation; it should hold train/ and validation/"
        )
    return parts[0], parts[1]


def _timm_part(name: str, root: str | None, splits: Sequence[str], download: bool) -> _Part:
    refusals = []
    for split in splits:
        try:
            dataset = create_dataset(name, root=root, split=split, download=download)
        except Exception as error:  # code of other libraries, on somebody's files
            refusals.append(f"{split}: {one_line(error)}")
            continue
        title = f"timm's {name!r}"
        if isinstance(dataset, IterableDataset):
            raise UserError(
                f"{title} is a stream, which can neither be shuffled nor cut in two; take a "
                "dataset that is read by index, such as hfds/ and not hfids/"
            )
        images = _TimmImages(dataset.reader) if hasattr(dataset, "reader") else dataset
        return _Part(images, _targets(images, title), _classes(images), title)
    raise UserError(f"timm cannot make {name!r} from data.root {root!r}: {'; '.join(refusals)}")


class _TimmImages(Dataset[tuple[Image.Image, int]]):
    """The images behind a dataset of timm, which itself skips those that it cannot read."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.root = getattr(reader, "root", "")
        self.class_to_idx = reader.class_to_idx
        if hasattr(reader, "samples"):
            self.samples = reader.samples
        elif hasattr(reader, "iter_targets"):
            self.targets = list(reader.iter_targets())

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file:
            return read_image(file, self.reader.filename(index, absolute=True)), target


def _files(part: _Part) -> set[str]:
    """The files of a dataset that is a folder."""
    return set(files_of(part.images))


def _targets(images: Any, name: str) -> list[int]:
    """Class numbers, from what the dataset keeps in memory or else from all its items."""
    kept = [getattr(images, attribute, None) for attribute in ("targets", "labels", "_labels")]
    for samples in (getattr(images, "samples", None), getattr(images, "_samples", None)):
        kept.append(None if samples is None else [sample[1] for sample in samples])
    for labels in kept:
        numbers = None if labels is None else _integers(labels)
        if numbers is not None and len(numbers) == len(images):
            break
    else:
        # The first one alone, before all images are read in vain.
        numbers = _integers(_labels(images, range(min(1, len(images))), name))
        if numbers is not None:
            numbers = _integers(_labels(images, range(len(images)), name))
    if numbers is None or min(numbers, default=0) < 0:
        raise UserError(f"{name} has labels other than class numbers from 0 on")
    if not numbers:
        raise UserError(f"{name} has no images")
    return numbers


def _labels(images: Any, indices: Iterable[int], name: str) -> list[Any]:
    labels = []
    for index in indices:
        try:
            labels.append(images[index][1])
        except Exception as error:  # code of another library, on somebody's files
            raise UserError(f"item {index} of {name} has no label: {one_line(error)}") from error
    return labels


def _integers(labels: Iterable[Any]) -> list[int] | None:
    """``labels`` as numbers, or None if they are none."""
    if isinstance(labels, (np.ndarray, torch.Tensor)):
        labels = labels.tolist()
    try:
        return [operator.index(label) for label in labels]
    except TypeError:
        return None


def _classes(images: Any) -> list[str] | None:
    """Names of the classes, where the dataset knows them."""
    names = getattr(images, "classes", None)
    if not names:
        numbers = getattr(images, "class_to_idx", None) or {}
        names = sorted(numbers, key=numbers.__getitem__)
    # ImageNet's classes have several names each.
    return [name if isinstance(name, str) else name[0] for name in names] or None


def _assemble(config: DataConfig, train: _Part, evaluation: _Part) -> Data:
    """Both parts as tensors, gray or in colour as the first training image is."""
    classes = train.classes
    if classes != evaluation.classes:
        odd = sorted(set(classes or []) ^ set(evaluation.classes or [])) or "their order"
        raise UserError(f"{train.name!r} and {evaluation.name!r} differ in the classes {odd}")
    hidden = [name for name in classes or [] if not _shows(name)]
    if hidden:
        raise UserError(f"{train.name!r} has a class {hidden[0]!r}: delete this hidden folder")
    if len(set(train.targets)) < 2:
        raise UserError(
            f"all images of {train.name!r} are in one class{_called(classes)}, and there is "
            "nothing to tell apart; a folder should hold train/CLASS/*.png and val/CLASS/*.png"
        )
    largest = max(max(train.targets), max(evaluation.targets))
    if classes is None:
        classes = [str(number) for number in range(largest + 1)]
    elif largest >= len(classes):
        raise UserError(f"{train.name} has labels up to {largest} and only {len(classes)} classes")

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and config.image_size**2 > limit:
        raise UserError(
            f"data.image_size {config.image_size} makes images of more than {limit} pixels; "
            "choose a smaller one"
        )
    mode = mode_of(get_image(train.images, 0, train.name), rgb=config.rgb)
    plain = evaluation_transform(config, mode)
    varied = training_transform(config, mode)
    # One image through the plain transform, which draws no random number, shows what is wrong.
    image, _ = ImageSet(train.images, train.targets, mode, plain, train.name)[0]
    channels, height, width = image.shape
    return Data(
        train_set=ImageSet(train.images, train.targets, mode, varied, train.name),
        train_targets=train.targets,
        train=range(len(train.targets)),
        evaluation_set=ImageSet(
            evaluation.images, evaluation.targets, mode, plain, evaluation.name
        ),
        evaluation_targets=evaluation.targets,
        evaluation=range(len(evaluation.targets)),
        classes=classes,
        image_shape=(channels, height, width),
        warnings=(*_nested(train.images), *_unread(train.images), *_unread(evaluation.images)),
    )


def _called(classes: Sequence[str] | None) -> str:
    return f", {classes[0]!r}" if classes is not None and len(classes) == 1 else ""


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise UserError(f"data.kind is {config.kind} and data.root is not set; give the folder")
    return Path(config.root)


def _name(config: DataConfig) -> str:
    if config.name is None:
        raise UserError(f"data.kind is {config.kind} and data.name is not set; give the dataset")
    return config.name
