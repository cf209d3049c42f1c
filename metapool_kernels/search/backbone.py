"""Networks from timm."""

import importlib
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from metapool_kernels.search.config import ModelConfig
from metapool_kernels.search.errors import UserError
from metapool_kernels.search.surgery import Site, find_sites


@dataclass
class Backbone:
    """All that it takes to build a network again.

    Args:
        name: a timm model.
        arguments: for ``timm.create_model``, number of classes and input channels among them.
        keep_dilation: False sets every dilation to 1.
        image_shape: of one input, (C, H, W).
    """

    name: str
    arguments: dict[str, Any]
    keep_dilation: bool
    image_shape: tuple[int, int, int]

    def build(self, seed: int) -> nn.Module:
        """The network; the initial weights depend on ``seed`` alone.

        Raises:
            UserError: timm does not know the model or refuses its arguments.
        """
        torch.manual_seed(seed)
        try:
            if ":" in self.name:
                module, function = self.name.split(":")
                make = getattr(importlib.import_module(module), function)
                model: nn.Module = make(**self.arguments)
            else:
                model = timm.create_model(self.name, **self.arguments)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"timm cannot make model {self.name!r} with {self.arguments}: {error}"
            ) from error
        if not self.keep_dilation:
            _remove_dilation(model)
        # Several times faster than contiguous maps on CPU, depthwise convolutions above all.
        return model.to(memory_format=torch.channels_last)


def make_backbone(config: ModelConfig, image_shape: tuple[int, int, int], classes: int) -> Backbone:
    """The backbone that the configuration asks for, fitted to the data."""
    arguments = {**config.arguments, "num_classes": classes, "in_chans": image_shape[0]}
    return Backbone(config.name, arguments, config.keep_dilation, image_shape)


def find_backbone_sites(backbone: Backbone, model: nn.Module, pattern: str) -> list[Site]:
    """:func:`metapool_kernels.search.surgery.find_sites` on an image of zeros.

    Raises:
        UserError: no site, an unusable one, or images that the network cannot take.
    """
    try:
        return find_sites(model, pattern, torch.zeros(1, *backbone.image_shape))
    except ValueError as error:
        raise UserError(f"model.insert_after: {error}") from error
    except RuntimeError as error:
        raise UserError(
            f"{backbone.name!r} cannot take images of {backbone.image_shape}: {error}"
        ) from error


def _remove_dilation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation = (1, 1)
            module.padding = tuple(side // 2 for side in module.kernel_size)
