"""ExecuTorch in 8-bit integers."""

from math import prod
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from metapool_kernels.devices.target import image_shape
from metapool_kernels.devices.targets.executorch import ExecuTorch, padded_averages
from metapool_kernels.plain import Form

aten = torch.ops.aten

_BATCH = 16
"""Images that ranges are read off at a time."""


class ExecuTorchInt8(ExecuTorch):
    """With XNNPACK, by torchao's static quantisation: weights of each channel, symmetric."""

    packages = ("executorch", "torchao")
    # What quantises is an average that is one operator.
    form = Form(pad_outside=False)
    file = "network.int8.pte"
    images: NDArray[np.float32]

    def calibrate(self, images: NDArray[np.float32]) -> None:
        """Images (N, C, H, W) to read ranges off."""
        self.images = images

    def _module(self, program: ExportedProgram) -> GraphModule:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        module = super()._module(program)
        _averages_as_convolutions(module)
        _unshare_weights(module)
        images = torch.zeros(3, *image_shape(program))
        traced = torch.export.export(module, (images,), dynamic_shapes=({0: Dim("batch")},))
        config = get_symmetric_quantization_config(is_per_channel=True)
        observed = prepare_pt2e(traced.module(), XNNPACKQuantizer().set_global(config))
        with torch.no_grad():
            for batch in torch.from_numpy(self.images).split(_BATCH):
                observed(batch)
        quantized: GraphModule = convert_pt2e(observed)
        return quantized


def _averages_as_convolutions(module: GraphModule) -> None:
    """Averages that count their padding become convolutions of each channel with equal weights.

    XNNPACK has integer kernels for these and none for averages.
    """
    graph = module.graph
    for number, (node, given) in enumerate(padded_averages(module)):
        if not given["count_include_pad"]:
            continue
        channels, window = node.meta["val"].shape[1], given["kernel_size"]
        weight = torch.full((channels, 1, *window), 1 / prod(window))
        module.register_buffer(name := f"average_{number}", weight)
        with graph.inserting_before(node):
            called = (given["self"], graph.get_attr(name), None, given["stride"], given["padding"])
            found = graph.call_function(aten.conv2d.default, (*called, [1, 1], channels))
        node.replace_all_uses_with(found)
        graph.erase_node(node)
    module.recompile()


def _unshare_weights(module: GraphModule) -> None:
    """Every operator has weights and a bias of its own.

    What two of them share is quantised for the ranges of one: XNNPACK refuses to load the other.
    """
    seen: set[str] = set()
    for node in list(module.graph.nodes):
        shared = node.all_input_nodes if node.op == "call_function" else []
        for weight in (each for each in shared if each.op == "get_attr"):
            name = str(weight.target)
            value = attrgetter(name)(module)
            if name in seen and isinstance(value, nn.Parameter):
                own = f"unshared_{len(seen)}"
                copied = nn.Parameter(value.detach().clone(), requires_grad=False)
                module.register_parameter(own, copied)
                with module.graph.inserting_before(node):
                    node.replace_input_with(weight, module.graph.get_attr(own))
                name = own
            seen.add(name)
    module.recompile()
