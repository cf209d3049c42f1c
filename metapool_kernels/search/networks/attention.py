"""Candidates with weights of their own, which the search may mix beside the poolings."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CoordinateAttention(nn.Module):
    """Coordinate attention: a gate for each row times a gate for each column.

    The averages over each row and over each column go through one shared 1x1 convolution, norm
    and activation, then each through a 1x1 convolution of its own and a sigmoid.

    Args:
        channels (int): channels C of the feature map.
        reduction (int): the shared convolution has ``max(8, C // reduction)`` channels.
            Default: 32.

    Shape:
        (N, C, H, W) to the same.

    Source: Hou et al., "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021.
    """

    def __init__(self, channels: int, reduction: int = 32) -> None:
        super().__init__()
        hidden = max(8, channels // reduction)
        # The norm takes every constant away again, so a bias before it would do nothing.
        self.shared = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.row_gate = nn.Conv2d(hidden, channels, 1)
        self.column_gate = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            rows, columns = self._shared_of_both(x)
        else:
            # The same, in operators that delegates of devices take.
            rows = self.shared(F.avg_pool2d(x, (1, x.shape[3])))
            columns = self.shared(F.avg_pool2d(x, (x.shape[2], 1)))
        out: Tensor = x * self.row_gate(rows).sigmoid() * self.column_gate(columns).sigmoid()
        return out

    def _shared_of_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns are one batch for the norm."""
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        both = self.shared(torch.cat((rows, columns), 2))
        rows, columns = both.split(x.shape[2:], 2)
        return rows, columns.transpose(2, 3)


EXTRA_CANDIDATES: Mapping[str, Callable[[int], nn.Module]] = {
    "coordinate_attention": CoordinateAttention
}
"""What makes each extra candidate for maps of a number of channels, by the candidate's name."""


def make_extra_candidates(names: Sequence[str], channels: int) -> dict[str, nn.Module]:
    """New extra candidates for maps of ``channels`` channels, by name.

    Raises:
        ValueError: a name that there is not, or twice.
    """
    unknown = sorted(set(names) - set(EXTRA_CANDIDATES))
    if unknown or len(set(names)) < len(names):
        raise ValueError(
            f"extra candidates should be among {', '.join(EXTRA_CANDIDATES)}, each once, "
            f"got {list(names)}"
        )
    return {name: EXTRA_CANDIDATES[name](channels) for name in names}
