"""ExecuTorch."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from metapool_kernels.devices.target import Converted, Runner, image_shape
from metapool_kernels.plain import Form


class ExecuTorch:
    """With XNNPACK, its delegate for CPUs, for all that this takes."""

    packages: tuple[str, ...] = ("executorch",)
    form = Form()
    any_batch = False
    file = "network.pte"

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write :attr:`file`."""
        from executorch.exir import to_edge_transform_and_lower

        images = torch.zeros(batch, *image_shape(program))
        fixed = torch.export.export(self._module(program), (images,))
        partitioners = self._partitioners()
        lowered = to_edge_transform_and_lower(fixed, partitioner=partitioners)
        outside = _outside(lowered.exported_program()) if partitioners else None
        (folder / self.file).write_bytes(lowered.to_executorch().buffer)
        return Converted([self.file], outside)

    def load(self, folder: Path, batch: int) -> Runner:
        """Its method ``forward``, on a pool of one thread."""
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(1)
        forward = Runtime.get().load_program(folder / self.file).load_method("forward")
        assert forward is not None

        def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
            (logits,) = forward.execute([torch.from_numpy(images)])
            found: NDArray[np.float32] = logits.numpy().copy()
            return found

        return run

    def _module(self, program: ExportedProgram) -> GraphModule:
        """The network in operators that the delegate takes, for batches of any size."""
        module = program.module()
        _step_behind_averages(module)
        return module

    def _partitioners(self) -> list[Any]:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        return [XnnpackPartitioner()]


def _step_behind_averages(module: GraphModule) -> None:
    """Averages that do not count their padding have stride 1, what is too much is dropped.

    With a stride XNNPACK gives wrong rows where the window is higher than the map.
    """
    aten = torch.ops.aten
    for node, given in padded_averages(module):
        if given["count_include_pad"] or max(given["stride"]) == 1:
            continue
        with module.graph.inserting_before(node):
            found = module.graph.call_function(
                aten.avg_pool2d.default,
                (given["self"], given["kernel_size"], [1, 1], given["padding"], False, False),
            )
            for dim, step in zip((2, 3), given["stride"], strict=True):
                found = module.graph.call_function(
                    aten.slice.Tensor, (found, dim, 0, sys.maxsize, step)
                )
        node.replace_all_uses_with(found)
        module.graph.erase_node(node)
    module.recompile()


def padded_averages(module: GraphModule) -> Iterator[tuple[Node, dict[str, Any]]]:
    """The average poolings with padding, each with its arguments, for height and for width.

    Those with windows beyond the padding, or a divisor of their own, are left out. Each is read
    when it is its turn, as one before it may have been replaced.
    """
    target = torch.ops.aten.avg_pool2d.default
    for node in module.graph.find_nodes(op="call_function", target=target):
        given = _arguments(node)
        given["stride"] = given["stride"] or given["kernel_size"]
        for name in ("kernel_size", "stride", "padding"):
            given[name] = list(given[name]) * (2 // len(given[name]))
        if any(given["padding"]) and not given["ceil_mode"] and given["divisor_override"] is None:
            yield node, given


def _arguments(node: Node) -> dict[str, Any]:
    """What an operator is called with, by name; the defaults where it is silent."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments
    given = {parameter.name: value for parameter, value in zip(schema, node.args, strict=False)}
    defaults = {parameter.name: parameter.default_value for parameter in schema}
    return defaults | given | node.kwargs


def _outside(program: ExportedProgram) -> list[str]:
    """Operators that are left to the portable kernels."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = [target.name() for target in targets if hasattr(target, "_schema")]
    return [name for name in names if name != "executorch_call_delegate"]
