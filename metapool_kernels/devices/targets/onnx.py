"""ONNX files, run by onnxruntime."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from metapool_kernels.devices.target import Converted, Runner
from metapool_kernels.plain import Form

if TYPE_CHECKING:
    from onnx import ModelProto

INPUT = "images"
OUTPUT = "logits"
BATCH = "batch"


class Onnx:
    """Any batch, operators of ONNX alone."""

    packages = ("onnx", "onnxscript", "onnxruntime")
    form = Form()
    any_batch = True
    file = "network.onnx"

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write :attr:`file`."""
        (folder / self.file).write_bytes(onnx_bytes(program))
        return Converted([self.file])

    def load(self, folder: Path, batch: int) -> Runner:
        """A session on one thread."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            folder / self.file, options, ["CPUExecutionProvider"]
        )

        def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
            (logits,) = session.run([OUTPUT], {INPUT: images})
            found: NDArray[np.float32] = logits
            return found

        return run


def onnx_bytes(program: ExportedProgram) -> bytes:
    """The file, as :func:`tidy` leaves it."""
    exported = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    assert exported is not None
    return tidy(exported.model_proto)


def tidy(model: "ModelProto") -> bytes:
    """The file of a model, with no word about the machine that it was made on.

    The size of a batch is called ``batch`` wherever it stands. Shapes between the layers are left
    out: whoever fixes the batch would have to change every one of them. So are stack traces and
    names of classes, which torch notes at every node.
    """
    import onnx

    graph = model.graph
    for holder in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        holder.doc_string = ""
        del holder.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del graph.value_info[:]
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
