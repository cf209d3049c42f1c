"""Keras, on the backend that KERAS_BACKEND names."""

import importlib
from importlib.metadata import version

import keras
import numpy as np

from tests.frameworks.rows import Framework, Map


def _pool(layer: keras.Layer, image: Map, dtype: str = "float32") -> object:
    x = keras.ops.cast(keras.ops.convert_to_tensor(image)[None, ..., None], dtype)
    return keras.ops.convert_to_numpy(keras.ops.cast(layer(x), "float32"))[0, ..., 0]


def _gradient(image: Map) -> object:
    """By the backend's own means."""
    layer = keras.layers.MaxPooling2D(3, 1, "same")
    backend = keras.backend.backend()
    if backend == "jax":
        jax = importlib.import_module("jax")
        return jax.grad(lambda x: layer(x[None, ..., None]).sum())(image)
    if backend == "torch":
        torch = importlib.import_module("torch")
        x = torch.from_numpy(image).requires_grad_()
        return torch.autograd.grad(layer(x[None, ..., None]).sum(), x)[0].numpy()
    tf = importlib.import_module("tensorflow")
    x = tf.constant(image)
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(layer(x[None, ..., None]))
    return tape.gradient(total, x).numpy()


def frameworks() -> list[Framework]:
    layers = keras.layers
    return [
        Framework(
            name=f"Keras {version('keras')} on {keras.backend.backend()}",
            maximum=lambda image: _pool(layers.MaxPooling2D(3, 1, "same"), image),
            gradient=_gradient,
            average=lambda image, window, dtype: _pool(
                layers.AveragePooling2D(window, 1, "same", dtype=dtype), image, dtype
            ),
            same=lambda image: _pool(layers.MaxPooling2D(3, 2, "same"), image),
            strideless=lambda image: _pool(layers.MaxPooling2D(2), image),
            adaptive=lambda line, bins: _pool(
                layers.AdaptiveAveragePooling2D((1, bins)), np.asarray(line)[None]
            )[0],
        )
    ]
