"""LiteRT, which was TensorFlow Lite."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from metapool_kernels.devices.target import Converted, Runner, image_shape
from metapool_kernels.plain import Form

FILE = "network.tflite"


class LiteRT:
    """With XNNPACK, which its interpreter takes by itself."""

    packages = ("litert_torch", "ai_edge_litert")
    form = Form()
    any_batch = False

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write ``network.tflite``."""
        import litert_torch

        images = torch.zeros(batch, *image_shape(program))
        litert_torch.convert(program.module(), (images,)).export(str(folder / FILE))
        return Converted([FILE])

    def load(self, folder: Path, batch: int) -> Runner:
        """Its interpreter, on one thread."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(folder / FILE), num_threads=1)
        interpreter.allocate_tensors()
        (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()

        def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
            interpreter.set_tensor(given["index"], images)
            interpreter.invoke()
            found: NDArray[np.float32] = interpreter.get_tensor(wanted["index"])
            return found

        return run
