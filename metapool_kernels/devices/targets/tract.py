"""Tract."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metapool_kernels.devices.target import Runner
from metapool_kernels.devices.targets.onnx import Onnx


class Tract(Onnx):
    """It reads ONNX files itself."""

    packages = ("onnx", "onnxscript", "tract")
    file = "network.tract.onnx"

    def load(self, folder: Path, batch: int) -> Runner:
        """The model, optimised for this size of batch; tract knows no threads."""
        import tract

        model = tract.onnx().load(folder / self.file)
        model.set_input_fact(0, _fact(folder / self.file, batch))
        runnable = model.into_model().into_runnable()

        def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
            (logits,) = runnable.run([images])
            found: NDArray[np.float32] = logits.to_numpy().copy()
            return found

        return run


def _fact(file: Path, batch: int) -> str:
    """The input as tract writes it: its sizes, then its type."""
    import onnx

    (given,) = onnx.load(file).graph.input
    sizes = [dim.dim_value for dim in given.type.tensor_type.shape.dim[1:]]
    return ",".join(map(str, [batch, *sizes, "f32"]))
