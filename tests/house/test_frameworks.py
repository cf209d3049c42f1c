"""The page on other frameworks: PyTorch's row, what to set here, what its check notices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from metapool_kernels import fused_meta_pool
from tests.frameworks import pytorch, rows
from tests.recorded import require_counted_torch


def test_pytorch_does_what_its_row_says() -> None:
    require_counted_torch()
    (framework,) = pytorch.frameworks()
    told = f"| {' | '.join(rows.row(framework)[1:])} |"
    page = rows.PAGE.read_text().splitlines()
    assert [line for line in page if line.startswith("| PyTorch ") and line.endswith(told)]


@pytest.mark.parametrize(
    "cell, maximum",
    [
        ("dropped", lambda a, b: np.fmax(a, b)),
        ("stays if first", lambda a, b: np.where(b > a, b, a)),
        ("stays if last, hides a 5", lambda a, b: np.where(a > b, a, b)),
        ("spreads", np.maximum),
    ],
)
def test_the_fate_of_nan_is_told_from_the_numbers(cell: str, maximum: np.ufunc) -> None:
    (framework,) = pytorch.frameworks()

    def pooled(image: NDArray[np.float32]) -> NDArray[np.float32]:
        h, w = image.shape
        padded = np.pad(image, 1, constant_values=-np.inf)
        out = padded[:h, :w]
        for k in range(1, 9):
            out = maximum(out, padded[k // 3 : k // 3 + h, k % 3 : k % 3 + w])
        return out

    assert rows.row(framework._replace(maximum=pooled))[2] == cell


@pytest.mark.parametrize("size, step", [(6, slice(1, None, 2)), (7, slice(0, None, 2))])
@pytest.mark.parametrize("k", [3, 5, 7])
def test_same_at_stride_2_as_in_tensorflow(k: int, size: int, step: slice) -> None:
    """ "SAME": as little padding as H / 2 rounded up needs, the larger half of it at the end."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    total = (-(-size // 2) - 1) * 2 + k - size
    pads = (total // 2, total - total // 2) * 2
    maxima = F.max_pool2d(F.pad(x, pads, value=-torch.inf), k, 2)
    counts = F.avg_pool2d(F.pad(torch.ones_like(x), pads), k, 2)
    averages = F.avg_pool2d(F.pad(x, pads), k, 2) / counts
    names = (f"max_pool_{k}x{k}", f"avg_pool_{k}x{k}")
    for name, expected in zip(names, (maxima, averages), strict=True):
        out = fused_meta_pool(x, torch.zeros(1), (name,), count_include_pad=False)
        torch.testing.assert_close(out[..., step, step], expected)
