"""One optimiser step: gradients of a batch, accumulated, divided once, guarded, applied.

Pure. Losses of other kinds of training give the same `(sum, weight, aux)` and use the same step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama_jax import config
from llama_jax.train.loss import Sums
from llama_jax.train.state import State

USUAL_LOSS_DECAY = 0.99  # the running mean that a spike is measured from covers about 100 steps


class Metrics(NamedTuple):
    """float32 scalars of one step."""

    loss: jax.Array  # nats a token, without z-loss
    tokens: jax.Array  # targets that counted
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    skipped: jax.Array  # 1: an anomaly, the update was left out
    skips_in_a_row: jax.Array


def make_step(
    loss: Callable[[Any, Any], Sums],
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    train: config.Train,
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """`step(state, batch) -> (state, metrics)`; every leaf of the batch is [B, ...]."""

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        gradient, sums = _accumulate(loss, state.params, batch, train.microbatches)
        weight = jnp.maximum(sums.weight, 1.0)  # not 0 / 0 where all is padding
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        mean_loss, grad_norm = sums.nll / weight, optax.tree.norm(gradient)

        bad = ~(jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm))
        if train.spike_nats:
            bad |= mean_loss > state.usual_loss + train.spike_nats  # False while the mean is NaN
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep_if_bad = lambda old, new: jnp.where(bad, old, new)  # noqa: E731
        first = jnp.isnan(state.usual_loss)
        usual = state.usual_loss + (1 - USUAL_LOSS_DECAY) * (mean_loss - state.usual_loss)
        skips_in_a_row = jnp.where(bad, state.skips_in_a_row + 1, 0)
        new_state = State(
            step=state.step + 1,
            params=jax.tree.map(keep_if_bad, state.params, params),
            opt_state=jax.tree.map(keep_if_bad, state.opt_state, opt_state),
            usual_loss=keep_if_bad(state.usual_loss, jnp.where(first, mean_loss, usual)),
            skips=state.skips + bad,
            skips_in_a_row=skips_in_a_row,
        )
        # The optimiser counts the updates it made: a skipped batch does not move the schedule.
        learning_rate = rate(state.step - state.skips)
        metrics = (mean_loss, sums.weight, grad_norm, learning_rate, bad, skips_in_a_row)
        return new_state, Metrics(*(jnp.asarray(m, jnp.float32) for m in metrics))

    return step


def _accumulate(loss, params, batch, parts: int) -> tuple[Any, Sums]:
    """Gradient and sums of a batch, `parts` microbatches one after another."""
    gradient_of = jax.grad(lambda p, b: (lambda sums: (sums.total, sums))(loss(p, b)), has_aux=True)
    if parts == 1:
        return gradient_of(params, batch)

    def one(carry, microbatch):
        return jax.tree.map(jnp.add, carry, gradient_of(params, microbatch)), None

    # Row i goes to microbatch i mod parts: each device's rows stay where they are.
    split = lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)  # noqa: E731
    zeros = jax.tree.map(jnp.zeros_like, params), Sums(*(jnp.zeros((), jnp.float32),) * 3)
    return jax.lax.scan(one, zeros, jax.tree.map(split, batch))[0]
