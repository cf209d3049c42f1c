"""tinygrad."""

from importlib.metadata import version

from tinygrad import Tensor, dtypes

from tests.frameworks.rows import Framework, Map


def _pool(image: Map) -> Tensor:
    return Tensor(image)[None, None]


def _gradient(image: Map) -> object:
    x = Tensor(image)
    return x[None, None].max_pool2d(3, 1, padding=1).sum().gradient(x)[0].numpy()


def _average(image: Map, window: int, dtype: str) -> object:
    x = _pool(image).cast(getattr(dtypes, dtype))
    return x.avg_pool2d(window, 1, padding=window // 2).float().numpy()[0, 0]


def frameworks() -> list[Framework]:
    return [
        Framework(
            name=f"tinygrad {version('tinygrad')}",
            maximum=lambda image: _pool(image).max_pool2d(3, 1, padding=1).numpy()[0, 0],
            gradient=_gradient,
            average=_average,
            same=lambda image: _pool(image).max_pool2d(3, 2, padding=1).numpy()[0, 0],
            ceil=lambda line, window, stride: (
                _pool(line[None])
                .avg_pool2d((1, window), (1, stride), ceil_mode=True)
                .numpy()[0, 0, 0]
            ),
            strideless=lambda image: _pool(image).max_pool2d(2).numpy()[0, 0],
        )
    ]
