"""Parameters of a network as it begins, drawn in NumPy: `transformer.init` takes a second to compile."""

import zlib

import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.model import transformer


def drawn(module, change=lambda leaf: leaf):
    """Scales of 1, biases of 0, else normal: float32, each `change`d, which is given NumPy arrays."""

    def one(name, shape):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("scale"):
            value = np.ones(shape)
        elif name.endswith("bias"):
            value = np.zeros(shape)
        else:
            value = rng.normal(scale=module.config.init_std, size=shape)
        return jnp.asarray(change(value.astype(np.float32)), jnp.float32)

    leaves = tree.paths(transformer.abstract(module))
    return tree.nest({name: one(name, leaf.shape) for name, leaf in leaves.items()})
