"""The position-wise network of a layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model.init import normal, param
from llama_jax.sharding import Layout


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv:2002.05202 eq. 6)."""

    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD):
        act, initialise = self.layout.act, normal(self.config)
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, param(self, "gate", "DF", initialise))
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, param(self, "up", "DF", initialise))
        gate_BTF = checkpoint_name(act(gate_BTF, "BTF"), "gate")
        up_BTF = checkpoint_name(act(up_BTF, "BTF"), "up")
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        return jnp.einsum("BTF,FD->BTD", hidden_BTF, param(self, "down", "FD", initialise))


class GELU(nn.Module):
    """down(gelu(up x)), the network of GPT (arXiv:1606.08415, exact form)."""

    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD):
        initialise = normal(self.config)
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, param(self, "up", "DF", initialise))
        up_BTF = checkpoint_name(self.layout.act(up_BTF, "BTF"), "up")
        hidden_BTF = jax.nn.gelu(up_BTF, approximate=False)
        return jnp.einsum("BTF,FD->BTD", hidden_BTF, param(self, "down", "FD", initialise))


FFNS = {"swiglu": SwiGLU, "gelu": GELU}
