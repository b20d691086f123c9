"""What training carries from step to step, and where it lives."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer
from llama_jax.sharding import Layout


@flax.struct.dataclass
class State:
    """step counts finished batches; the last three serve the anomaly guard."""

    step: jax.Array  # int32
    params: Any
    opt_state: Any
    usual_loss: jax.Array  # float32, running mean of the loss; NaN before the first step
    skips: jax.Array  # int32, updates left out so far
    skips_in_a_row: jax.Array  # int32


def abstract(module: Transformer, tx: optax.GradientTransformation) -> State:
    """The shapes of a state; no memory."""
    return jax.eval_shape(lambda params: _make(params, tx), transformer.abstract(module))


def shardings(module: Transformer, tx: optax.GradientTransformation, layout: Layout) -> State:
    """The sharding of each leaf. What the optimiser keeps for each entry of a parameter lies like it.

    Sums over its rows or columns (Adafactor) are small and everywhere.
    """
    of_params = jax.tree.map(layout.param, transformer.letters(module))
    shapes = abstract(module, tx)
    places = dict(jax.tree.leaves_with_path(of_params))
    sizes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes.params)}

    def place(path, leaf):
        """Its path ends in that of a parameter."""
        ends = (path[i:] for i in range(len(path)))
        return next(
            (places[end] for end in ends if sizes.get(end) == leaf.shape), layout.replicated
        )

    of_optimiser = jax.tree.map_with_path(place, shapes.opt_state)
    replicated = jax.tree.map(lambda _: layout.replicated, shapes)
    return replicated.replace(params=of_params, opt_state=of_optimiser)


def init(module: Transformer, tx: optax.GradientTransformation, layout: Layout, seed: int) -> State:
    """A fresh state, made where it will live: no device ever holds an unsharded parameter."""
    make = jax.jit(
        lambda key: _make(transformer.init(module, key), tx),
        out_shardings=shardings(module, tx, layout),
    )
    return make(jax.random.key(seed))


def _make(params, tx):
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        usual_loss=jnp.full((), jnp.nan, jnp.float32),
        skips=jnp.zeros((), jnp.int32),
        skips_in_a_row=jnp.zeros((), jnp.int32),
    )
