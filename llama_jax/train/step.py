"""One optimiser step: gradients of a batch, accumulated, divided once, guarded, applied.

Pure. Every training method is an Objective and uses this step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama_jax import config, tree
from llama_jax.train.objective import Objective, Sums, Weighted
from llama_jax.train.state import State

USUAL_LOSS_DECAY = 0.99  # the running mean that a spike is measured from covers about 100 steps


class Metrics(NamedTuple):
    """float32 scalars of one step."""

    loss: jax.Array  # mean of the reported loss; in pretraining nats a token, without z-loss
    weight: jax.Array  # the divisor of that mean
    tokens: jax.Array  # of the batch that are trained on
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    skipped: jax.Array  # 1: an anomaly, the update was left out
    skips_in_a_row: jax.Array
    aux: dict[str, Weighted]  # (mean, weight) of each sum that is recorded besides the loss


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    train: config.Train,
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """`step(state, frozen, batch) -> (state, metrics)`; every leaf of the batch is [B, ...].

    Only state.params are differentiated and updated.
    """

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
        gradient, sums = _accumulate(
            objective.sums, state.params, frozen, batch, train.microbatches
        )
        divisor = _divisor(sums.weight)
        gradient = jax.tree.map(lambda g: g / divisor, gradient)
        means = {
            name: (total / _divisor(weight), weight)
            for name, (total, weight) in sums.reported.items()
        }
        mean_loss, weight = means.pop("loss")
        grad_norm = optax.tree.norm(gradient)

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
        tokens = objective.tokens(batch)
        metrics = (mean_loss, weight, tokens, grad_norm, learning_rate, bad, skips_in_a_row)
        return new_state, Metrics(*(jnp.asarray(m, jnp.float32) for m in metrics), aux=means)

    return step


def _divisor(weight: jax.Array) -> jax.Array:
    return jnp.where(weight == 0, 1.0, weight)  # not 0 / 0 where all is padding


def _accumulate(sums, trained, frozen, batch, parts: int) -> tuple[Any, Sums]:
    """Gradient and sums of a batch, `parts` microbatches one after another."""

    def total(trained, batch):
        found = sums(trained, frozen, batch)
        for name, leaf in tree.paths(found).items():
            scalar = jnp.shape(leaf) == () and jnp.result_type(leaf) == jnp.float32
            assert scalar, f"Sums.{name} of an objective must be a float32 scalar, not {leaf}"
        return found.total, found

    gradient_of = jax.grad(total, has_aux=True)
    if parts == 1:
        return gradient_of(trained, batch)

    def add(carry, microbatch):
        return jax.tree.map(jnp.add, carry, gradient_of(trained, microbatch)), None

    # Row i goes to microbatch i mod parts: each device's rows stay where they are.
    split = lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)  # noqa: E731
    microbatches = jax.tree.map(split, batch)
    first = lambda x: x[0]  # noqa: E731
    shapes = jax.eval_shape(lambda: sums(trained, frozen, jax.tree.map(first, microbatches)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, trained), zeros), microbatches)[0]
