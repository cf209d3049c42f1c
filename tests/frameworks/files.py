"""``python -m tests.frameworks.files NAME``: numbers at the edge in the files of a target.

Exports single layers side by side, runs them in the real runtime, prints the row for the page and
ends with 1 if the page has another. NAME is a target of ``metapool export`` that is installed.
"""

import sys
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from metapool_kernels.candidates import parse_candidate
from metapool_kernels.devices.registry import load_target
from metapool_kernels.devices.run import TargetError, run_target
from metapool_kernels.devices.target import trace
from metapool_kernels.plain import Form, plain_pool
from tests.frameworks.rows import fate, number, print_and_compare

COLUMNS = (
    "",
    "NaN under max 3x3, 7x7",
    "map of -Inf under them",
    "maps of -1e8, -1e38 under them",
    "NaN under avg 3x3",
    "Inf under avg 3x3",
    "1e38 under avg 3x3",
    "Hardswish of NaN",
)
SHAPE = (8, 9, 9)

Images = NDArray[np.float32]


class _Layers(nn.Module):
    """Each layer's output, one behind the other along the channels."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        names = ("max_pool_3x3", "max_pool_7x7", "avg_pool_3x3")
        pools = [plain_pool(parse_candidate(name), (1, 1), True, form) for name in names]
        self.layers = nn.ModuleList([*pools, nn.Hardswish()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], 1)


def row(name: str) -> list[str]:
    """A cell for each of :data:`COLUMNS`."""
    form = load_target(name).form
    answer = run_target(name, {"network": trace(_Layers(form), SHAPE, form)}, cases=_cases())
    small, large, average, swish = (
        {case: outputs[0].reshape(4, *SHAPE)[k] for case, outputs in answer.outputs.items()}
        for k in range(4)
    )
    versions = [f"{k} {v}" for k, v in answer.versions.items() if k in RUNTIMES]
    return [
        f"{name} ({', '.join(versions)})",
        _both(_spread(small, 3), _spread(large, 7)),
        _both(_filled(small, "-inf"), _filled(large, "-inf")),
        _both(
            *(f"{_filled(found, '-1e8')}, {_filled(found, '-1e38')}" for found in (small, large))
        ),
        _spread(average, 3),
        _infinite(average),
        _filled(average, "1e38"),
        _spread(swish, 1),
    ]


def _cases() -> dict[str, Images]:
    one = np.zeros((1, *SHAPE), np.float32)
    cases = {}
    for name in ("nan", "inf"):
        cases[name] = one.copy()
        cases[name][..., 4, 4] = float(name)
    return cases | {name: one + np.float32(name) for name in ("-inf", "-1e8", "-1e38", "1e38")}


RUNTIMES = ("onnxruntime", "openvino", "ncnn", "MNN", "ai_edge_litert", "tract", "executorch")


def _both(small: str, large: str) -> str:
    return small if small == large else f"{small}; {large}"


def _spread(outputs: Mapping[str, Images], window: int) -> str:
    """What becomes of a NaN in the middle, in every channel."""
    near = slice(4 - window // 2, 5 + window // 2)
    found = {
        "spreads as -Inf"
        if np.isneginf(image[near, near]).all()
        else fate(np.isnan(image)[near, near])
        for image in outputs["nan"]
    }
    return " or ".join(sorted(found))


def _infinite(outputs: Mapping[str, Images]) -> str:
    image = outputs["inf"]
    if np.isnan(image).any():
        return f"{np.isnan(image[0]).sum()} NaN of {image[0].size}"
    return "Inf" if (np.isinf(image).sum((1, 2)) == 9).all() else f"{image.max():g}"


def _filled(outputs: Mapping[str, Images], name: str) -> str:
    """The middle of a map that is the same everywhere, in every channel."""
    found = {float(value) for value in outputs[name][:, 4, 4]}
    told = {
        "kept" if np.isclose(value, np.float32(name), rtol=1e-5) else number(value)
        for value in found
    }
    return " or ".join(sorted(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        sys.exit(min(1, print_and_compare(COLUMNS, [row(sys.argv[1])])))
    except TargetError as error:
        sys.exit(str(error))
