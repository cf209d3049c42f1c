"""MLX."""

from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tests.frameworks.rows import Framework, Map


def _maximum(x: mx.array) -> mx.array:
    return nn.MaxPool2d(3, 1, 1)(x[None, :, :, None])[0, :, :, 0]


def _gradient(image: Map) -> object:
    return np.array(mx.grad(lambda x: _maximum(x).sum())(mx.array(image)))


def _average(image: Map, window: int, dtype: str) -> object:
    x = mx.array(image).astype(getattr(mx, dtype))[None, :, :, None]
    return np.array(nn.AvgPool2d(window, 1, window // 2)(x)[0, :, :, 0].astype(mx.float32))


def frameworks() -> list[Framework]:
    return [
        Framework(
            name=f"MLX {version('mlx')}",
            maximum=lambda image: np.array(_maximum(mx.array(image))),
            gradient=_gradient,
            average=_average,
            same=lambda image: nn.MaxPool2d(3, 2, 1)(mx.array(image)[None, :, :, None])[0, :, :, 0],
            strideless=lambda image: nn.MaxPool2d(2)(mx.array(image)[None, :, :, None])[0, :, :, 0],
        )
    ]
