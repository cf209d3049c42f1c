"""PyTorch."""

import torch
import torch.nn.functional as F

from tests.frameworks.rows import Framework, Map


def _maximum(image: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(image[None], 3, 1, 1)[0]


def _gradient(image: Map) -> torch.Tensor:
    x = torch.from_numpy(image).requires_grad_()
    return torch.autograd.grad(_maximum(x).sum(), x)[0]


def frameworks() -> list[Framework]:
    return [
        Framework(
            name=f"PyTorch {torch.__version__.split('+')[0]}",
            maximum=lambda image: _maximum(torch.from_numpy(image)).numpy(),
            gradient=lambda image: _gradient(image).numpy(),
            average=lambda image, window, dtype: (
                F.avg_pool2d(
                    torch.from_numpy(image)[None].to(getattr(torch, dtype)), window, 1, window // 2
                )[0]
                .float()
                .numpy()
            ),
            same=lambda image: F.max_pool2d(torch.from_numpy(image)[None], 3, 2, 1)[0].numpy(),
            ceil=lambda line, window, stride: F.avg_pool1d(
                torch.from_numpy(line)[None], window, stride, ceil_mode=True
            )[0].numpy(),
            strideless=lambda image: F.max_pool2d(torch.from_numpy(image)[None], 2)[0].numpy(),
            adaptive=lambda line, bins: F.adaptive_avg_pool1d(torch.from_numpy(line)[None], bins)[
                0
            ].numpy(),
        )
    ]
