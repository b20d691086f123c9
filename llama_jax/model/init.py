"""How a module makes a parameter: a name, letters, an initial value. The letters give the shape.

The letters ride along as Linen's logical partitioning; they are the sharding key and say which
parameters are matrices. `nn.scan` over layer groups puts "L" in front of them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax import dims


def param(module: nn.Module, name: str, letters: str, initialise) -> jax.Array:
    """A float32 parameter of shape `letters`, cast to the compute dtype of `module.config` and gathered.

    The backward pass gathers it again: remat never saves "gathered".
    """
    size = dims.sizes(module.config)
    shape = tuple(size[letter] for letter in letters)
    labelled = nn.with_logical_partitioning(initialise, tuple(letters))
    w = module.param(name, labelled, shape, jnp.float32)
    gathered = module.layout.gather(w, letters, module.config.compute_dtype)
    return checkpoint_name(gathered, "gathered")


def normal(config):
    """Zero-mean normal. LLaMA's paper gives no value; 0.02 is GPT-2's and Hugging Face's default."""
    return nn.initializers.normal(config.init_std)
