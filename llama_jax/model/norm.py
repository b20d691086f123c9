"""Normalisation of the last dimension; statistics in float32 whatever the input's dtype."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax import config
from llama_jax.model.init import param


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale (arXiv:1910.07467 eq. 4). The backward pass stores x alone."""
    return _normed(x, eps)[0].astype(x.dtype) * scale


def _rms_forward(x, scale, eps):
    return rms_norm(x, scale, eps), (x, scale)


def _rms_backward(eps, inputs, slope):
    """With n = x r, r = 1 / sqrt(mean(x^2) + eps): dx = r (dn - n mean(dn n)), dn = slope * scale."""
    x, scale = inputs
    normed, inverse = _normed(x, eps)
    slope = slope.astype(jnp.float32)
    normed_slope = slope * scale.astype(jnp.float32)
    along = jnp.mean(normed_slope * normed, axis=-1, keepdims=True)
    x_slope = inverse * (normed_slope - normed * along)
    scale_slope = jnp.sum(slope * normed, axis=tuple(range(x.ndim - 1)))
    return x_slope.astype(x.dtype), scale_slope.astype(scale.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


def _normed(x, eps):
    """float32 x / rms(x), and 1 / rms(x)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32 * inverse, inverse


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
