"""The position-wise network of a layer."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model.init import dense_param
from llama_jax.model.linear import linear
from llama_jax.sharding import Layout


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up. The backward pass takes the sigmoid again instead of storing what it made."""
    return jax.nn.silu(gate) * up


def _gated_forward(gate, up):
    return gated(gate, up), (gate, up)


def _gated_backward(inputs, slope):
    gate, up = inputs
    sigmoid = jax.nn.sigmoid(gate)
    # d silu(g) / d g = sigmoid(g) (1 + g (1 - sigmoid(g)))
    return slope * up * sigmoid * (1 + gate * (1 - sigmoid)), slope * gate * sigmoid


gated.defvjp(_gated_forward, _gated_backward)


class Gated(nn.Module):
    """down(activate(gate x, up x)): the networks of arXiv:2002.05202 eq. 6, of three matrices."""

    config: config.Model
    layout: Layout
    activate: Callable

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF, up_BTF = _widen(self, x_BTD, "gate", "up")
        return _narrow(self, self.activate(gate_BTF, up_BTF))


class Plain(nn.Module):
    """down(activate(up x)), of two matrices (arXiv:1706.03762 eq. 2)."""

    config: config.Model
    layout: Layout
    activate: Callable

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return _narrow(self, self.activate(*_widen(self, x_BTD, "up")))


def _widen(module, x_BTD, *names):
    def product(name):
        x_BTF = linear(module, name, "BTD,DF->BTF", x_BTD, "inner")
        if module.config.bias == "all":
            x_BTF += dense_param(module, f"{name}_bias", "F", nn.initializers.zeros)
        return x_BTF

    wide = [product(name) for name in names]
    act = module.layout.act
    return [checkpoint_name(act(x, "BTF"), name) for name, x in zip(names, wide, strict=True)]


def _narrow(module, hidden_BTF):
    out_BTD = linear(module, "down", "BTF,FD->BTD", hidden_BTF, "residual")
    if module.config.bias == "all":
        out_BTD += dense_param(module, "down_bias", "D", nn.initializers.zeros)
    return out_BTD


def _gelu(x):
    """The exact form (arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


FFNS = {
    "swiglu": functools.partial(Gated, activate=gated),
    "geglu": functools.partial(Gated, activate=lambda gate, up: _gelu(gate) * up),
    "reglu": functools.partial(Gated, activate=lambda gate, up: jax.nn.relu(gate) * up),
    "gelu": functools.partial(Plain, activate=_gelu),
    "relu": functools.partial(Plain, activate=jax.nn.relu),
    # Primer, arXiv:2109.08668 section 3.
    "relu2": functools.partial(Plain, activate=lambda x: jnp.square(jax.nn.relu(x))),
}
