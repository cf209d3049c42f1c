"""Candidates with weights of their own."""

from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from metapool_kernels.search.networks.attention import (
    EXTRA_CANDIDATES,
    CoordinateAttention,
    make_extra_candidates,
)
from metapool_kernels.search.settings.config import ModelConfig


def test_the_settings_offer_every_extra_candidate() -> None:
    (names,) = get_args(get_type_hints(ModelConfig)["extra_candidates"])
    assert set(get_args(names)) == set(EXTRA_CANDIDATES)


@pytest.mark.parametrize(("channels", "hidden"), [(6, 8), (256, 8), (320, 10)])
def test_coordinate_attention_is_what_the_paper_says(channels: int, hidden: int) -> None:
    """Pixel by pixel: x times a gate of its row times a gate of its column."""
    torch.manual_seed(0)
    module = CoordinateAttention(channels).eval()
    convolution, norm, _ = module.shared
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, channels, 3, 5)
    assert convolution.out_channels == hidden

    def gate(average: torch.Tensor, own: nn.Conv2d) -> torch.Tensor:
        mixed = average @ convolution.weight[:, :, 0, 0].T
        scaled = (mixed - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        active = scaled * (scaled + 3).clamp(0, 6) / 6
        return 1 / (1 + (-(active @ own.weight[:, :, 0, 0].T + own.bias)).exp())

    expected = torch.empty_like(x)
    for i in range(3):
        for j in range(5):
            row = gate(x[:, :, i, :].sum(2) / 5, module.row_gate)
            column = gate(x[:, :, :, j].sum(2) / 3, module.column_gate)
            expected[:, :, i, j] = x[:, :, i, j] * row * column
    torch.testing.assert_close(module(x), expected)
    # In training rows and columns go through the norm together.
    module.train().shared.eval()
    torch.testing.assert_close(module(x), expected)


def test_rows_and_columns_share_the_statistics_of_the_norm() -> None:
    module = CoordinateAttention(4).train()
    seen: list[torch.Tensor] = []
    module.shared.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.randn(2, 4, 3, 5)
    module(x).sum().backward()
    assert [tuple(t.shape) for t in seen] == [(2, 4, 8, 1)]
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert module(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("names", [["attention"], ["coordinate_attention"] * 2])
def test_other_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="among coordinate_attention, each once, got"):
        make_extra_candidates(names, 4)
