"""The position-wise network of a layer."""

import functools

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model.init import normal, param
from llama_jax.model.linear import linear
from llama_jax.sharding import Layout


@jax.custom_vjp
def gated(gate, up):
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


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv:2002.05202 eq. 6)."""

    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD):
        act, initialise = self.layout.act, normal(self.config)
        product = functools.partial(linear, layout=self.layout)
        gate_BTF = product("BTD,DF->BTF", x_BTD, param(self, "gate", "DF", initialise))
        up_BTF = product("BTD,DF->BTF", x_BTD, param(self, "up", "DF", initialise))
        gate_BTF = checkpoint_name(act(gate_BTF, "BTF"), "gate")
        up_BTF = checkpoint_name(act(up_BTF, "BTF"), "up")
        hidden_BTF = gated(gate_BTF, up_BTF)
        return product("BTF,FD->BTD", hidden_BTF, param(self, "down", "FD", initialise))


class GELU(nn.Module):
    """down(gelu(up x)), the network of GPT (arXiv:1606.08415, exact form)."""

    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD):
        initialise = normal(self.config)
        product = functools.partial(linear, layout=self.layout)
        up_BTF = product("BTD,DF->BTF", x_BTD, param(self, "up", "DF", initialise))
        up_BTF = checkpoint_name(self.layout.act(up_BTF, "BTF"), "up")
        hidden_BTF = jax.nn.gelu(up_BTF, approximate=False)
        return product("BTF,FD->BTD", hidden_BTF, param(self, "down", "FD", initialise))


FFNS = {"swiglu": SwiGLU, "gelu": GELU}
