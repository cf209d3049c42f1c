"""ONNX files in 8-bit integers, run by onnxruntime."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.export import ExportedProgram

from metapool_kernels.devices.target import Converted
from metapool_kernels.devices.targets.onnx import INPUT, Onnx, onnx_bytes, tidy
from metapool_kernels.plain import Form


class OnnxInt8(Onnx):
    """By onnxruntime's static quantisation: weights of each channel, activations of each tensor.

    Both are unsigned. For signed activations onnxruntime has fewer kernels, so that averages and
    multiplications would stay in float32; and on processors with AVX2 and without VNNI products of
    signed weights with them saturate.
    """

    # Zeros around a map by an operator of their own would be put there in float32.
    form = Form(pad_outside=False)
    file = "network.int8.onnx"
    images: NDArray[np.float32]

    def calibrate(self, images: NDArray[np.float32]) -> None:
        """Images (N, C, H, W) to read ranges off."""
        self.images = images

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write :attr:`file`."""
        import onnx
        from onnxruntime.quantization import QuantType, quantize_static

        model = onnx.load_from_string(onnx_bytes(program))
        path = folder / self.file
        quantize_static(
            model,
            path,
            _Reader(self.images),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8,
        )
        path.write_bytes(tidy(onnx.load(path)))
        return Converted([self.file])


class _Reader:
    """The images one at a time, as onnxruntime asks for them."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._images: Iterator[NDArray[np.float32]] = iter(images[:, None])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT: image}
