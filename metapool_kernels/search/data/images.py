"""Images of files and datasets, as their transform takes them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from metapool_kernels.search.errors import UserError

_GRAY = {"1", "L", "LA", "La", "I;16", "I;16L", "I;16B"}
_UNLIMITED = {"I", "F"}  # 32 bits, and nothing says which value is white


def read_image(source: str | Path | IO[bytes], name: str | None = None) -> Image.Image:
    """Decode an image file, in whatever mode it is; ``name`` is for the error message.

    Raises:
        UserError: it is not there, no image, or damaged.
    """
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise UserError(
            f"image {name or str(source)!r} cannot be read: {one_line(error)}"
        ) from error


def one_line(error: BaseException) -> str:
    """What an exception of another library says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def mode_of(image: Image.Image, *, rgb: bool) -> str:
    """The mode that a dataset with this image is converted to: ``L`` for gray, or ``RGB``."""
    return "L" if image.mode in _GRAY and not rgb else "RGB"


def files_of(images: Any) -> list[str]:
    """The files of a dataset, in order, where it is one of files."""
    samples = getattr(images, "samples", None) or getattr(images, "_samples", None) or ()
    paths = [sample[0] for sample in samples]
    return [os.fspath(path) for path in paths if isinstance(path, (str, os.PathLike))]


def _upright(image: Image.Image) -> Image.Image:
    """``image`` as its camera was held, which EXIF data say."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data tell nothing, and the image is there
        return image


def convert(image: Image.Image, mode: str) -> Image.Image:
    """``image`` upright, in mode ``L`` or ``RGB``; of transparent pixels the colours stay.

    Raises:
        ValueError: colours would be lost, or pixels have no known range.
    """
    if image.mode in _UNLIMITED:
        raise ValueError(
            f"it has pixels of 32 bits (mode {image.mode}) and no known white; "
            "store it with 8 or 16 bits"
        )
    if mode == "L" and image.mode not in _GRAY:
        raise ValueError(
            f"it is in colour (mode {image.mode}) and the first image is gray; set data.rgb true"
        )
    if image.mode.startswith("I;16"):
        # Pillow would cut everything above 255 off instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return _upright(image).convert(mode)


class ImageSet(Dataset[tuple[Tensor, int]]):
    """The images of another dataset as tensors, with class numbers.

    Args:
        images: gives (PIL image, anything) for an index.
        targets: class number of each.
        mode: ``L`` or ``RGB``.
        transform: from an image of that mode to a tensor.
        name: of the dataset, for error messages.
    """

    def __init__(
        self,
        images: Any,
        targets: Sequence[int],
        mode: str,
        transform: Callable[[Image.Image], Tensor],
        name: str,
    ) -> None:
        self.images = images
        self.targets = targets
        self.mode = mode
        self.transform = transform
        self.name = name

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        target = self.targets[index]  # first: IndexError ends a loop over the images
        converted, name = self.converted(index)
        try:
            return self.transform(converted), target
        except Exception as error:  # random operations of other libraries, on somebody's image
            raise UserError(
                f"image {name!r} cannot be brought to data.image_size and varied as data.augment "
                f"says: {one_line(error)}"
            ) from error

    def converted(self, index: int) -> tuple[Image.Image, str]:
        """An image in the mode of all, and what to call it.

        Raises:
            UserError: it cannot be used.
        """
        image = get_image(self.images, index, self.name)
        name = getattr(image, "filename", "") or f"{index} of {self.name}"
        try:
            return convert(image, self.mode), name
        except ValueError as error:
            raise UserError(f"image {name!r} cannot be used: {error}") from error


def get_image(images: Any, index: int, name: str) -> Image.Image:
    """Image number ``index`` of a dataset called ``name``.

    Raises:
        UserError: it cannot be read, or is no image.
    """
    try:
        image = images[index][0]
    except UserError:
        raise
    except Exception as error:  # code of other libraries, on somebody's files
        raise UserError(f"image {index} of {name} cannot be read: {one_line(error)}") from error
    if not isinstance(image, Image.Image):
        raise UserError(f"{name} gives {type(image).__name__} objects where images were expected")
    return image
