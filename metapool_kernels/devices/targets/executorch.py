"""ExecuTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from metapool_kernels.devices.target import Converted, Runner, with_batch
from metapool_kernels.plain import Form

FILE = "network.pte"


class ExecuTorch:
    """With XNNPACK, its delegate for CPUs, for all that this takes."""

    packages = ("executorch",)
    form = Form()
    any_batch = False

    def convert(self, program: ExportedProgram, folder: Path, batch: int) -> Converted:
        """Write ``network.pte``."""
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(
            with_batch(program, batch), partitioner=self._partitioners()
        )
        outside = _outside(lowered.exported_program())
        (folder / FILE).write_bytes(lowered.to_executorch().buffer)
        return Converted([FILE], outside)

    def load(self, folder: Path, batch: int) -> Runner:
        """Its method ``forward``, on a pool of one thread."""
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(1)
        forward = Runtime.get().load_program(folder / FILE).load_method("forward")
        assert forward is not None

        def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
            (logits,) = forward.execute([torch.from_numpy(images)])
            found: NDArray[np.float32] = logits.numpy().copy()
            return found

        return run

    def _partitioners(self) -> list[Any]:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        return [XnnpackPartitioner()]


def _outside(program: ExportedProgram) -> list[str]:
    """Operators that are left to the portable kernels."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = [target.name() for target in targets if hasattr(target, "_schema")]
    return [name for name in names if name != "executorch_call_delegate"]
