"""OpenVINO."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.export import ExportedProgram

from metapool_kernels.devices.target import Converted, Runner
from metapool_kernels.devices.targets.onnx import onnx_bytes
from metapool_kernels.plain import Form

FILES = ["network.xml", "network.bin"]

_ONE_THREAD = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}


class OpenVino:
    """By way of ONNX, which its converter takes without sending anything home."""

    packages = ("onnx", "onnxscript", "openvino")
    form = Form()
    any_batch = True

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write ``network.xml`` and ``network.bin``."""
        import openvino

        model = openvino.Core().read_model(onnx_bytes(program))
        openvino.save_model(model, folder / FILES[0], compress_to_fp16=False)
        return Converted(FILES)

    def load(self, folder: Path, batch: int) -> Runner:
        """A request to the CPU, on one stream."""
        import openvino

        model = openvino.Core().compile_model(folder / FILES[0], "CPU", _ONE_THREAD)
        request = model.create_infer_request()

        def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
            found: NDArray[np.float32] = request.infer([images])[0].copy()
            return found

        return run
