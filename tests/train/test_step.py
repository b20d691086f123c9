import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config
from llama_jax.data.batch import Batch
from llama_jax.model import transformer
from llama_jax.train import loss, optim, state, step

B, T = 4, 6
OPTIM = config.Optim(warmup_steps=0, learning_rate=1e-2)


def batch(model, seed=0, weights=None):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.vocab_size, (B, T + 1))
    weights = np.ones((B, T)) if weights is None else weights
    positions = np.broadcast_to(np.arange(T), (B, T))
    return Batch(
        *map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], weights, positions, np.ones((B, T), int)))
    )


@functools.cache  # compiling is what takes the time
def setup(model, layout, **train):
    objective = loss.next_token(transformer.build(model, layout))
    tx, rate = optim.build(OPTIM, 100, objective.letters)
    train = config.Train(batch_size=B, **train)
    advance = jax.jit(step.make_step(objective, tx, rate, train))
    return state.init(objective, tx, layout, 0), lambda now, rows: advance(now, {}, rows)


def same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch_when_token_counts_differ(model, layout, parts):
    weights = np.ones((B, T))
    weights[0], weights[1, 2:], weights[3, 1:] = 0, 0, 0  # 0, 2, 6 and 1 tokens
    start, whole = setup(model, layout)
    _, split = setup(model, layout, microbatches=parts)
    expected, metrics = whole(start, batch(model, weights=weights))
    ours, ours_metrics = split(start, batch(model, weights=weights))
    assert float(ours_metrics.tokens) == 9
    assert float(ours_metrics.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
    assert float(ours_metrics.grad_norm) == pytest.approx(float(metrics.grad_norm), rel=1e-5)
    same(ours.opt_state, expected.opt_state, rtol=1e-4, atol=1e-8)


def test_padding_changes_nothing(model, layout):
    start, advance = setup(model, layout)
    weights = np.ones((B, T))
    weights[2:] = 0
    one = batch(model, weights=weights)
    other = one._replace(
        tokens_BT=one.tokens_BT.at[2:].set(3), targets_BT=one.targets_BT.at[2:].set(5)
    )
    same(advance(start, one)[0], advance(start, other)[0], rtol=0, atol=0)


def poisoned(start):
    """A state whose loss is not a number."""
    return start.replace(
        params={**start.params, "output": start.params["output"].at[0, 0].set(jnp.nan)}
    )


def test_a_loss_that_is_not_a_number_leaves_everything_but_the_count(model, layout):
    start, advance = setup(model, layout)
    start, _ = advance(start, batch(model))
    bad = poisoned(start)
    after, metrics = advance(bad, batch(model, 1))
    assert float(metrics.skipped) == 1
    assert (int(after.step), int(after.skips), int(after.skips_in_a_row)) == (2, 1, 1)
    same(after.params, bad.params, rtol=0, atol=0)
    same(after.opt_state, bad.opt_state, rtol=0, atol=0)
    healed, metrics = advance(after.replace(params=start.params), batch(model, 2))
    assert float(metrics.skipped) == 0
    assert (int(healed.skips), int(healed.skips_in_a_row)) == (1, 0)
    assert float(metrics.learning_rate) == pytest.approx(float(optim.schedule(OPTIM, 100)(1)))


def test_a_spike_is_left_out_and_an_ordinary_step_is_not(model, layout):
    start, advance = setup(model, layout, spike_nats=0.5)
    start, metrics = advance(start, batch(model))
    assert float(metrics.skipped) == 0, "no mean to compare the first loss with"
    assert float(start.usual_loss) == pytest.approx(float(metrics.loss))
    usual = float(metrics.loss)
    _, metrics = advance(start.replace(usual_loss=jnp.float32(usual - 0.1)), batch(model))
    assert float(metrics.skipped) == 0
    _, metrics = advance(start.replace(usual_loss=jnp.float32(usual - 1.0)), batch(model))
    assert float(metrics.skipped) == 1


def test_the_running_mean_moves_by_a_hundredth(model, layout):
    start, advance = setup(model, layout)
    start, first = advance(start, batch(model))
    after, second = advance(start, batch(model, 1))
    expected = float(first.loss) * 0.99 + float(second.loss) * 0.01
    assert float(after.usual_loss) == pytest.approx(expected, rel=1e-6)


def test_loss_falls_when_a_batch_is_repeated(model, layout):
    start, advance = setup(model, layout)
    losses = []
    for _ in range(30):
        start, metrics = advance(start, batch(model))
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(model.vocab_size), rel=0.02), "as good as guessing"
    assert losses[-1] < 1.0


def test_metrics_are_of_the_batch(model, layout):
    start, advance = setup(model, layout)
    one = batch(model)
    _, metrics = advance(start, one)
    module = transformer.build(model, layout)
    objective = lambda p: loss.next_token(module).sums(p, {}, one).total / (B * T)
    gradient = jax.grad(objective)(start.params)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    assert float(metrics.tokens) == B * T
    assert float(metrics.loss) == pytest.approx(float(objective(start.params)), rel=1e-6)
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)


def test_z_loss_is_in_the_gradient_but_not_in_the_reported_loss(model, layout):
    module = transformer.build(dataclasses.replace(model, init_std=0.5), layout)
    params = transformer.init(module, jax.random.key(0))
    plain, with_z = (
        loss.next_token(module, 1, z).sums(params, {}, batch(model)) for z in (0.0, 0.1)
    )
    nll, nll_with_z = (float(sums.reported["loss"][0]) for sums in (plain, with_z))
    assert nll_with_z == pytest.approx(nll, rel=1e-6)
    assert float(with_z.total) > float(plain.total) * 1.01
