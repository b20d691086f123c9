"""How a module makes a parameter: a name, letters, an initial value. The letters give the shape.

The letters ride along as Linen's logical partitioning; they are the sharding key and say which
parameters are matrices. `nn.scan` over layer groups puts "L" in front of them.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config, dims
from llama_jax.model.quantised import Quantised, spread


def param(module: Any, name: str, letters: str, initialise: Callable) -> jax.Array | Quantised:
    """A float32 parameter of shape `letters`, cast to the compute dtype of `module.config` and gathered.

    Where quant/ has put whole numbers in its place, those.

    Its initial value depends on the seed, its path and its shape alone: networks that differ elsewhere
    begin with the same numbers. The backward pass gathers it again: remat never saves "gathered".
    """
    shape = dims.shape(letters, module.config)

    def by_name(key, *shape_and_dtype):
        # Linen's own key counts the parameters made before. When it only compares shapes there are no keys.
        if "params" in module.scope.rngs:
            key = module.scope.rngs["params"].as_jax_rng()
        return initialise(jax.random.fold_in(key, zlib.crc32(name.encode())), *shape_and_dtype)

    labelled = nn.with_logical_partitioning(by_name, tuple(letters))
    w = module.param(name, labelled, shape, jnp.float32)
    if isinstance(w, Quantised):
        gather = module.layout.gather
        return jax.tree.map(lambda x: gather(x, spread(letters, x.shape), x.dtype), w)
    gathered = module.layout.gather(w, letters, module.config.compute_dtype)
    return checkpoint_name(gathered, "gathered")


def dense_param(module: Any, name: str, letters: str, initialise: Callable) -> jax.Array:
    """`param` for what is never quantised: scales, biases, tables of positions."""
    w = param(module, name, letters, initialise)
    assert not isinstance(w, Quantised), (
        f"{name} is no matrix: quant.network.scheme leaves it as it is"
    )
    return w


def initial(model: config.Model, role: str) -> Callable:
    """The initialiser of a matrix: zero-mean normal, its standard deviation by `model.init` and role.

    Roles: "table" (looked up), "inner", "residual" (what it makes is added to the residual stream),
    "output" (makes logits).
    """
    return nn.initializers.normal(INITS[model.init](model, role))


def normal(model: config.Model, role: str) -> float:
    """One for all. LLaMA's paper gives no value; 0.02 is GPT-2's and Hugging Face's default."""
    return model.init_std


def depth_scaled(model: config.Model, role: str) -> float:
    """GPT-2's (section 2.3): what is added 2L times is smaller by sqrt(2L)."""
    return model.init_std / (math.sqrt(2 * model.layers) if role == "residual" else 1)


def mup(model: config.Model, role: str) -> float:
    """muP (arXiv:2203.03466 table 8): variance of inner matrices as 1 / fan-in, else as at the base width.

    Its other half: `mup_ratio` divides logits (transformer.py) and the learning rate of inner matrices
    (train/optim.py). Widths grow by heads, whose own width stays.
    """
    inner = role in ("inner", "residual")
    return model.init_std / (math.sqrt(mup_ratio(model)) if inner else 1)


def mup_ratio(model: config.Model) -> float:
    """The width over the base width; 1 without muP."""
    return model.dim / model.mup_base_dim if model.init == "mup" else 1.0


INITS = {"normal": normal, "depth_scaled": depth_scaled, "mup": mup}
