"""Where the programs run: on a GPU, or for a rehearsal on the CPU."""

import os

from tests import cuda_host


def prepare(device: str) -> None:
    """Have ``backend="cuda"`` take CPU tensors in a rehearsal."""
    if device == "cpu" and (library := os.environ.get("METAPOOL_CUDA_HOST")):
        cuda_host.load(library)
