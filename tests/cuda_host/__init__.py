"""CUDA's programming model on the CPU, as much of it as kernels like those of csrc/cuda use."""

import torch

from metapool_kernels.dispatch import BACKENDS


def load(library: str) -> None:
    """Have ``backend="cuda"`` run a library that :mod:`tests.cuda_host.build` made."""
    torch.ops.load_library(library)
    BACKENDS["cuda"] = _refuse


def _refuse(x: torch.Tensor) -> str | None:
    device = x.device.type
    return None if device in ("cpu", "meta") else f"METAPOOL_CUDA_HOST is set and x is on {device}"
