"""ExecuTorch without a delegate."""

from typing import Any

from metapool_kernels.devices.targets.executorch import ExecuTorch


class ExecuTorchPortable(ExecuTorch):
    """With its portable kernels alone, which run on every processor and are slow."""

    file = "network.portable.pte"

    def _partitioners(self) -> list[Any]:
        return []
