"""A linear layer's product: an einsum whose gradient is cheap on every backend."""

import math

import jax
import jax.numpy as jnp

from llama_jax.sharding import Layout


def linear(letters: str, x: jax.Array, w: jax.Array, layout: Layout) -> jax.Array:
    """`einsum(letters, x, w)` where x is BT and the contracted letters, as in "BTNH,NHD->BTD".

    On one device B and T are merged first. With two contracted dimensions XLA:CPU writes a transposed
    copy of every activation for the gradient of w, a fifth of the step (LOG.md). Across devices
    they stay apart: they are sharded apart.
    """
    if layout.mesh.size > 1:
        return jnp.einsum(letters, x, w)
    B, T, *contracted = x.shape
    out = w.shape[len(contracted) :]
    width = math.prod(contracted)
    return (x.reshape(B * T, width) @ w.reshape(width, -1)).reshape(B, T, *out)
