"""TensorFlow: tf.nn, eager and compiled by XLA."""

from collections.abc import Callable

import tensorflow as tf

from tests.frameworks.rows import Framework, Map


def _maximum(image: tf.Tensor, stride: int = 1) -> tf.Tensor:
    return tf.nn.max_pool2d(image[None, ..., None], 3, stride, "SAME")[0, ..., 0]


def _gradient(image: tf.Tensor) -> tf.Tensor:
    with tf.GradientTape() as tape:
        tape.watch(image)
        total = tf.reduce_sum(_maximum(image))
    return tape.gradient(total, image)


def _framework(
    mode: str, compiled: Callable[[Callable[..., tf.Tensor]], Callable[..., tf.Tensor]]
) -> Framework:
    def average(image: Map, window: int, dtype: str) -> object:
        pool = compiled(lambda x: tf.nn.avg_pool2d(x[None, ..., None], window, 1, "SAME"))
        try:
            return tf.cast(pool(tf.cast(image, dtype)), tf.float32)[0, ..., 0].numpy()
        except tf.errors.OpError as error:
            raise RuntimeError from error

    return Framework(
        name=f"TensorFlow {tf.__version__}, {mode}",
        maximum=lambda image: compiled(_maximum)(tf.constant(image)).numpy(),
        gradient=lambda image: compiled(_gradient)(tf.constant(image)).numpy(),
        average=average,
        same=lambda image: _maximum(tf.constant(image), 2).numpy(),
    )


def frameworks() -> list[Framework]:
    return [
        _framework("eager", lambda function: function),
        _framework("XLA", lambda function: tf.function(function, jit_compile=True)),
    ]
