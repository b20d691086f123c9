"""Normalisation of the last dimension; statistics in float32 whatever the input's dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax import config
from llama_jax.model.init import param


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale (arXiv:1910.07467 eq. 4)."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype) * scale


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias (arXiv:1607.06450 eq. 4)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * scale + bias


class RMSNorm(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, x_BTD):
        scale_D = param(self, "scale", "D", nn.initializers.ones)
        return rms_norm(x_BTD, scale_D, self.config.norm_eps)


class LayerNorm(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, x_BTD):
        scale_D = param(self, "scale", "D", nn.initializers.ones)
        bias_D = param(self, "bias", "D", nn.initializers.zeros)
        return layer_norm(x_BTD, scale_D, bias_D, self.config.norm_eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
