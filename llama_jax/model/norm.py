"""Normalisation of the last dimension; statistics in float32 whatever the input's dtype."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model.init import dense_param
from llama_jax.sharding import Layout


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale (arXiv:1910.07467 eq. 4).

    The backward pass stores x and, a number a row, 1 / sqrt(...).
    """
    return _scaled(x, _inverse(x, eps), scale)


def _rms_forward(x, scale, eps):
    inverse = checkpoint_name(_inverse(x, eps), "rms")
    return _scaled(x, inverse, scale), (x, inverse, scale)


def _rms_backward(eps, inputs, slope):
    """With r = 1 / sqrt(mean(x^2) + eps) and dn = slope * scale: dx = r dn - x r^3 mean(dn x)."""
    x, inverse, scale = inputs
    x32, slope = x.astype(jnp.float32), slope.astype(jnp.float32)
    normed_slope = slope * scale.astype(jnp.float32)
    along = jnp.mean(normed_slope * x32, axis=-1, keepdims=True)
    x_slope = inverse * normed_slope - x32 * (inverse**3 * along)
    scale_slope = jnp.sum(slope * (x32 * inverse), axis=tuple(range(x.ndim - 1)))
    return x_slope.astype(x.dtype), scale_slope.astype(scale.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


def _inverse(x, eps):
    """float32 1 / rms(x)."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + eps)


def _scaled(x, inverse, scale):
    return (x.astype(jnp.float32) * inverse).astype(x.dtype) * scale


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias (arXiv:1607.06450 eq. 4)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * scale + bias


class RMSNorm(nn.Module):
    config: config.Model
    layout: Layout
    letter: str = "D"  # of the dimension that is normalised

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = dense_param(self, "scale", self.letter, nn.initializers.ones)
        return rms_norm(x, scale, self.config.norm_eps)


class LayerNorm(nn.Module):
    config: config.Model
    layout: Layout
    letter: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = dense_param(self, "scale", self.letter, nn.initializers.ones)
        bias = dense_param(self, "bias", self.letter, nn.initializers.zeros)
        return layer_norm(x, scale, bias, self.config.norm_eps)


class PlainNorm(nn.Module):
    """Layer norm without scale and bias (OLMo, arXiv:2402.00838 section 2.1)."""

    config: config.Model
    layout: Layout
    letter: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one, zero = (jnp.full((), value, x.dtype) for value in (1, 0))
        return layer_norm(x, one, zero, self.config.norm_eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "plain": PlainNorm}
