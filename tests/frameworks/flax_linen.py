"""JAX: the poolings of flax, eager and compiled."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.frameworks.rows import Framework, Map

PADDING = ((1, 1), (1, 1))


def _maximum(image: jax.Array) -> jax.Array:
    return nn.max_pool(image[None, ..., None], (3, 3), padding=PADDING)[0, ..., 0]


def _average(image: Map, window: int, dtype: str) -> jax.Array:
    half = (window // 2, window // 2)
    x = jnp.asarray(image, dtype)[None, ..., None]
    return nn.avg_pool(x, (window, window), padding=(half, half))[0, ..., 0].astype(jnp.float32)


def frameworks() -> list[Framework]:
    def gradient(image: Map) -> jax.Array:
        return jax.grad(lambda x: _maximum(x).sum())(image)

    def average(image: Map, window: int, dtype: str) -> jax.Array:
        return jax.jit(_average, static_argnums=(1, 2))(image, window, dtype)

    found = [
        Framework(
            name=f"JAX {jax.__version__}, flax {flax.__version__}{mode}",
            maximum=lambda image, compiled=compiled: compiled(_maximum)(jnp.asarray(image)),
            gradient=lambda image, compiled=compiled: compiled(gradient)(jnp.asarray(image)),
            average=averaged,
            same=lambda image: nn.max_pool(image[None, ..., None], (3, 3), (2, 2), "SAME")[
                0, ..., 0
            ],
            strideless=lambda image: nn.max_pool(image[None, ..., None], (2, 2))[0, ..., 0],
        )
        for mode, compiled, averaged in (
            ("", lambda function: function, _average),
            (", jit", jax.jit, average),
        )
    ]
    return found
