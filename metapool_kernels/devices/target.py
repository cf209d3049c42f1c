"""What a runtime is asked for."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import Dim, ExportedProgram

from metapool_kernels.convertible import to_plain
from metapool_kernels.plain import Form, freeze_norms

Runner = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Images (N, C, H, W) to outputs (N, ...)."""

PROGRAM = "network.pt2"


class Converted(NamedTuple):
    """What a conversion has left.

    ``files`` are names in the folder; ``outside`` the operators that the runtime's fast part leaves
    to another, one name for each time, or None where there is no such part.
    """

    files: list[str]
    outside: list[str] | None = None


class Target(Protocol):
    """A converter and its runtime, which are imported when they are called and not before.

    Attributes:
        packages: what has to be importable.
        form: the poolings that the runtime is fastest with.
        any_batch: whether one file takes batches of any size.
    """

    packages: tuple[str, ...]
    form: Form
    any_batch: bool

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write the files.

        Args:
            program: in float32 and eval mode, with a batch of any size.
            folder: where they go.
            batch: number of images at a time, where it has to be known.
        """
        ...

    def load(self, folder: Path, batch: int) -> Runner:
        """The files in the real runtime, in float32 and on one thread."""
        ...


@runtime_checkable
class Int8Target(Target, Protocol):
    """One whose files compute in 8-bit integers, with ranges that are read off images."""

    def calibrate(self, images: NDArray[np.float32]) -> None:
        """Take the images (N, C, H, W) that the next conversions read ranges off."""
        ...


def image_shape(program: ExportedProgram) -> tuple[int, ...]:
    """Of one input: (C, H, W)."""
    (name,) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == name)
    return tuple(int(size) for size in node.meta["val"].shape[1:])


def with_batch(program: ExportedProgram, batch: int) -> ExportedProgram:
    """The same for ``batch`` images and no other number."""
    images = torch.zeros(batch, *image_shape(program))
    return torch.export.export(program.module(), (images,))


def trace(network: nn.Module, shape: Sequence[int], form: Form) -> ExportedProgram:
    """The network as a target takes it; it stays as it is itself.

    Args:
        network: plain modules of torch, enhancers and mixtures of this package.
        shape: of an image, (C, H, W).
        form: how poolings are written.
    """
    plain = to_plain(copy.deepcopy(network).cpu().eval(), form)
    # Many runtimes know one layout alone, and converters write copies and views for another.
    plain = plain.to(memory_format=torch.contiguous_format)
    freeze_norms(plain)
    for module in plain.modules():
        # Converters have no rule for an activation in place, and spell it out: half of their time.
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010
    images = (torch.zeros(3, *shape),)
    program = torch.export.export(plain, images, dynamic_shapes=({0: Dim("batch")},))
    forget_origin(program)
    return program


def forget_origin(program: ExportedProgram) -> None:
    """Drop what tells of the machine and of the images that it was made with."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
