"""Networks from timm, from torchvision and from the user's own code."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from metapool_kernels.search.errors import UserError
from metapool_kernels.search.settings.config import ModelConfig

TEACHER = "teacher"
"""Stands in ``model.weights`` for weights that are in no file."""

_TORCHVISION = "torchvision/"
# Of other libraries, for names and arguments they do not know and files they cannot fetch.
_REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError, LookupError, OSError)
# By these timm is given files, which it unpickles where they are no safetensors.
_UNPICKLING = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}
_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


@dataclass
class Backbone:
    """All that it takes to build a network again.

    Args:
        name: a timm model, ``torchvision/NAME`` or ``MODULE:FUNCTION``.
        arguments: for what makes the network, number of classes and input channels among them.
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
            UserError: there is no such model, it refuses its arguments or takes no such images.
        """
        torch.manual_seed(seed)
        if self.name.startswith(_TORCHVISION):
            model = _from_torchvision(self.name, self.arguments, self.image_shape[0])
        elif _FUNCTION.fullmatch(self.name):
            model = _from_function(self.name, self.arguments)
        else:
            model = _from_timm(self.name, self.arguments)
        if not self.keep_dilation:
            _remove_dilation(model)
        # Several times faster than contiguous maps on CPU, depthwise convolutions above all.
        return model.to(memory_format=torch.channels_last)

    def load_initial_weights(self, model: nn.Module, path: str | Path) -> None:
        """Let ``model``, as :meth:`build` gives it, begin with the weights in a file.

        Names and shapes must be those of ``model``, but for one module, the classifier: if its
        tensors differ from the file's in the number of classes alone, they stay as drawn.

        Args:
            model: the network without enhancers.
            path: a safetensors file.

        Raises:
            UserError: there is no such file, or its tensors are not those of ``model``.
        """
        try:
            loaded = load_file(path)
        except OSError as error:
            raise UserError(f"model.weights: cannot read {str(path)!r}: {error}") from error
        except SafetensorError as error:
            raise UserError(
                f"model.weights: cannot read {str(path)!r}, which is no whole safetensors file "
                f"({error}); safetensors.torch.save_file writes such files"
            ) from error
        own = model.state_dict()
        classifier = _other_classes(own, loaded, self.arguments.get("num_classes"))
        if len({name.rpartition(".")[0] for name in classifier}) == 1:
            loaded |= {name: own[name] for name in classifier}
        try:
            model.load_state_dict(loaded)
        except RuntimeError as error:
            raise UserError(
                f"model.weights: {str(path)!r} does not fit {self.name!r} without enhancers: "
                f"{_strangers(own, loaded) or error}"
            ) from error


def make_backbone(config: ModelConfig, image_shape: tuple[int, int, int], classes: int) -> Backbone:
    """The backbone that the configuration asks for, fitted to the data."""
    fitted = {"num_classes": classes}
    if not config.name.startswith(_TORCHVISION):
        fitted["in_chans"] = image_shape[0]
    return Backbone(config.name, {**config.arguments, **fitted}, config.keep_dilation, image_shape)


def _from_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    refused = sorted(_UNPICKLING & arguments.keys())
    if refused or name.startswith("local-dir:"):
        what = f"model.arguments.{refused[0]}" if refused else f"model {name!r}"
        raise UserError(
            f"{what} would unpickle a file, which may execute what it holds; give a safetensors "
            "file as model.weights"
        )
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except _REFUSALS as error:
        raise UserError(f"timm cannot make model {name!r} with {arguments}: {error}") from error
    return model


def _from_torchvision(name: str, arguments: Mapping[str, Any], channels: int) -> nn.Module:
    if channels != 3:
        raise UserError(
            f"{name!r} takes images of three channels only, these have {channels}; set data.rgb "
            "to true"
        )
    try:
        model: nn.Module = torchvision.models.get_model(
            name.removeprefix(_TORCHVISION), **arguments
        )
    except _REFUSALS as error:
        raise UserError(
            f"torchvision cannot make model {name!r} with {arguments}: {error}"
        ) from error
    return model


def _from_function(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if not {"num_classes", "in_chans"} <= arguments.keys():
        # Only a damaged or foreign file leads here, and that may name any function there is.
        raise UserError(f"{name!r} has to be given num_classes and in_chans, got {arguments}")
    module_name, function_name = name.split(":")
    # As with "python -m", a module in the current folder counts as installed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"model.name: cannot import {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"model.name: module {module_name!r} has no function {function_name!r}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{name!r} does not take {arguments}: {error}") from error
    # What goes wrong inside is for the author of the function, who needs the traceback.
    model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise UserError(f"{name!r} should return an nn.Module, got {type(model)!r}")
    return model


def _other_classes(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], classes: int | None
) -> list[str]:
    """Names of the tensors whose shapes differ in their first side alone, here ``classes``."""
    return [
        name
        for name, tensor in own.items()
        if name in loaded
        and tensor.shape != loaded[name].shape
        and tensor.shape[:1] == (classes,)
        and tensor.shape[1:] == loaded[name].shape[1:]
    ]


def _strangers(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str:
    """Which names are in one of the two alone, short enough for a line."""
    lacking, strange = ([n for n in a if n not in b] for a, b in ((own, loaded), (loaded, own)))
    parts = [f"it lacks {len(lacking)} of the {len(own)} tensors, such as {lacking[:1]}"]
    parts += [f"it has {len(strange)} that the network has not, such as {strange[:1]}"]
    return "; ".join(part for part, names in zip(parts, (lacking, strange), strict=True) if names)


def _remove_dilation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation = (1, 1)
            module.padding = tuple(side // 2 for side in module.kernel_size)
