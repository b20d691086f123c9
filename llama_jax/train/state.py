"""What training carries from step to step, and where it lives."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from llama_jax.sharding import Layout
from llama_jax.train.objective import Objective


@flax.struct.dataclass
class State:
    """step counts finished batches; the last three serve the anomaly guard."""

    step: jax.Array  # int32
    params: Any  # the trained ones: what is frozen is no part of a state
    opt_state: Any
    usual_loss: jax.Array  # float32, running mean of the loss; NaN before the first step
    skips: jax.Array  # int32, updates left out so far
    skips_in_a_row: jax.Array  # int32


def abstract(objective: Objective, tx: optax.GradientTransformation, layout: Layout) -> State:
    """Shape, dtype and sharding of each leaf (jax.ShapeDtypeStruct); no memory.

    What the optimiser keeps for each entry of a parameter is sharded like the parameter. Sums over its rows
    or columns (Adafactor) are small and replicated.
    """
    shapes = jax.eval_shape(lambda key: _make(objective.init(key), tx), jax.random.key(0))
    of_params = jax.tree.map(layout.param, objective.letters)
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
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        replicated.replace(params=of_params, opt_state=of_optimiser),
    )


def shardings(objective: Objective, tx: optax.GradientTransformation, layout: Layout) -> State:
    """The sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(objective, tx, layout))


def init(
    objective: Objective, tx: optax.GradientTransformation, layout: Layout, seed: int
) -> State:
    """A fresh state, made where it will live: no device ever holds an unsharded parameter."""
    make = jax.jit(
        lambda key: _make(objective.init(key), tx),
        out_shardings=shardings(objective, tx, layout),
    )
    return make(jax.random.key(seed))


def begin(
    objective: Objective, tx: optax.GradientTransformation, layout: Layout, params: Any
) -> State:
    """A state at step 0 of trained parameters that are here already, sharded. They are given up."""
    make = jax.jit(
        lambda params: _make(params, tx),
        donate_argnums=0,
        out_shardings=shardings(objective, tx, layout),
    )
    return make(params)


def _make(params, tx):
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        usual_loss=jnp.full((), jnp.nan, jnp.float32),
        skips=jnp.zeros((), jnp.int32),
        skips_in_a_row=jnp.zeros((), jnp.int32),
    )
