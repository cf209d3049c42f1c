"""PaddlePaddle."""

import numpy as np
import paddle
import paddle.nn.functional as F

from tests.frameworks.rows import Framework, Map


def _pool(image: Map) -> paddle.Tensor:
    return paddle.to_tensor(image)[None, None]


def _gradient(image: Map) -> object:
    x = paddle.to_tensor(image, stop_gradient=False)
    return paddle.grad(F.max_pool2d(x[None, None], 3, 1, 1).sum(), x)[0].numpy()


def _average(image: Map, window: int, dtype: str) -> object:
    found = F.avg_pool2d(_pool(image).astype(dtype), window, 1, window // 2)
    return found.astype("float32").numpy()[0, 0]


def frameworks() -> list[Framework]:
    return [
        Framework(
            name=f"PaddlePaddle {paddle.__version__}",
            maximum=lambda image: F.max_pool2d(_pool(image), 3, 1, 1).numpy()[0, 0],
            gradient=_gradient,
            average=_average,
            same=lambda image: F.max_pool2d(_pool(image), 3, 2, "SAME").numpy()[0, 0],
            ceil=lambda line, window, stride: F.avg_pool1d(
                paddle.to_tensor(line)[None, None], window, stride, ceil_mode=True
            ).numpy()[0, 0],
            strideless=lambda image: F.max_pool2d(_pool(image), 2).numpy()[0, 0],
            adaptive=lambda line, bins: F.adaptive_avg_pool1d(
                paddle.to_tensor(np.asarray(line))[None, None], bins
            ).numpy()[0, 0],
        )
    ]
