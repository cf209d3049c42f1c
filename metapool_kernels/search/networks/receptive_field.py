"""How much of the image a unit can see, measured on the network itself."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

CHUNK = 16
"""Images that go through the network at a time: memory stays small with large images too."""


def receptive_fields(
    model: nn.Module, sites: Sequence[str], image_shape: tuple[int, int, int], least: int = 0
) -> dict[str, tuple[int, int]]:
    """Receptive field of the centre unit of some maps, for any topology.

    Each row of the image in turn, then each column, is filled with NaN, and the maps show where it
    has come: a unit that can depend on a pixel turns NaN with it, whatever the weights. What spans
    the whole map, such as squeeze-and-excitation, rightly sees the whole image.

    Args:
        model: any network on the CPU (fast convolutions of GPUs carry a NaN to their whole tile);
            it is run in evaluation mode and comes back as it was.
        sites: names of modules that give maps (N, C, H, W).
        image_shape: of one input, (C, H, W).
        least: heights are measured on images at least that tall, widths on images at least that
            wide, so that fields beyond small images show; those of ``image_shape`` if the network
            takes no others.

    Returns:
        By name, height and width in pixels from the first to the last that is seen, as dilated
        windows are measured; never more than the image. (0, 0) where nothing is seen.

    Raises:
        AttributeError: a name that ``model`` does not have.
    """
    channels, height, width = image_shape
    taller, wider = (channels, max(height, least), width), (channels, height, max(width, least))
    try:
        heights = _extents(model, sites, taller, axis=1)
        widths = _extents(model, sites, wider, axis=2)
    except RuntimeError:
        if taller == wider == image_shape:
            raise
        return receptive_fields(model, sites, image_shape)
    return {name: (heights[name], widths[name]) for name in sites}


def _extents(
    model: nn.Module, sites: Sequence[str], image_shape: tuple[int, int, int], axis: int
) -> dict[str, int]:
    seen: dict[str, list[int]] = {name: [] for name in sites}
    # Not zeros: a network may divide by the norm of its input, and 0 / 0 is NaN by itself.
    image = torch.rand(image_shape, generator=torch.Generator().manual_seed(0)) + 1
    for positions in torch.arange(image_shape[axis]).split(CHUNK):
        images = image.repeat(len(positions), 1, 1, 1)
        for one, position in zip(images, positions.tolist(), strict=True):
            one.select(axis, position).fill_(math.nan)
        for name, reached in _reached(model, sites, images).items():
            seen[name] += positions[reached].tolist()
    return {name: max(seen[name]) - min(seen[name]) + 1 if seen[name] else 0 for name in sites}


def _reached(model: nn.Module, sites: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """For each module, which images' NaN have come to the centre unit behind it, shape (N,)."""
    reached: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        centre = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
        reached[name] = centre.isnan().any(1)

    modules = [model.get_submodule(name) for name in sites]
    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in zip(sites, modules, strict=True)
    ]
    try:
        # NNPACK's convolution by tiles would carry a NaN to the whole of its tile.
        with _evaluating(model), torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
            model(images.contiguous(memory_format=torch.channels_last))
    finally:
        for hook in hooks:
            hook.remove()
    return reached


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
