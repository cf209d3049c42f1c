"""MNN."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.export import ExportedProgram

from metapool_kernels.devices.target import Converted, Runner
from metapool_kernels.devices.targets.onnx import INPUT, OUTPUT, onnx_bytes
from metapool_kernels.plain import Form

FILE = "network.mnn"


class Mnn:
    """By way of ONNX."""

    packages = ("onnx", "onnxscript", "MNN")
    form = Form()
    any_batch = True

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write ``network.mnn``."""
        # MNN.tools, which is built on this module, installs packages and reports each conversion.
        import _tools

        onnx, file = folder / "from.onnx", folder / FILE
        onnx.write_bytes(onnx_bytes(program))
        files = ["--modelFile", str(onnx), "--MNNModel", str(file)]
        _tools.mnnconvert(["mnnconvert", "--framework", "ONNX", *files, "--bizCode", "metapool"])
        onnx.unlink()
        if not file.exists():
            raise RuntimeError("MNN's converter has written no file")
        return Converted([FILE])

    def load(self, folder: Path, batch: int) -> Runner:
        """A module on the CPU in its high precision, which is float32."""
        import MNN

        manager = MNN.nn.create_runtime_manager(
            ({"backend": "CPU", "precision": "high", "numThread": 1},)
        )
        network = MNN.nn.load_module_from_file(
            str(folder / FILE), [INPUT], [OUTPUT], runtime_manager=manager
        )

        def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
            given = MNN.expr.placeholder(list(images.shape), MNN.expr.NCHW, MNN.expr.float)
            given.write(images)
            (logits,) = network.onForward([given])
            return np.array(logits.read(), np.float32)

        return run
