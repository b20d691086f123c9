import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.model import logprobs, transformer
from llama_jax.model.quantised import Quantised
from llama_jax.model.transformer import Hidden
from llama_jax.quant import rounding
from llama_jax.train import loss

B, T, D, V = 2, 6, 5, 41
ONE = sharding.make(config.Mesh(), jax.devices()[:1])
RNG = np.random.default_rng(0)
X, W, TARGETS = RNG.normal(size=(B, T, D)), RNG.normal(size=(D, V)), RNG.integers(0, V, (B, T))


def expected(x_BTD, w_DV, temperature):
    """Log-probability of each target and entropy, float64."""
    logits = x_BTD @ w_DV / temperature
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, TARGETS[..., None], axis=-1)[..., 0]
    return chosen, -np.sum(np.exp(log_p) * log_p, axis=-1)


def ours(x_BTD, w_DV, temperature, chunks):
    hidden = Hidden(jnp.asarray(x_BTD, jnp.float32), jnp.asarray(w_DV, jnp.float32))
    return logprobs.token_logprobs_and_entropy(hidden, TARGETS, ONE, temperature, chunks)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunks", [1, 3])
def test_values_are_the_formula(temperature, chunks):
    found, wanted = ours(X, W, temperature, chunks), expected(X, W, temperature)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    hidden = Hidden(jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32))
    alone = logprobs.token_logprobs(hidden, TARGETS, ONE, temperature, chunks)
    np.testing.assert_array_equal(alone, found[0])
    of_logits = logprobs.of_logits(transformer.logits(hidden), TARGETS, temperature)
    np.testing.assert_allclose(of_logits, wanted[0], rtol=1e-5, atol=1e-6)


def test_gradient_is_the_slope_of_the_formula():
    """Of every token with another weight, temperature 0.6, three chunks; central differences in float64."""
    a, b = RNG.normal(size=(2, B, T))

    def weighed(logprob, entropy):
        return (a * logprob + b * entropy).sum()

    found = jax.grad(lambda x, w: weighed(*ours(x, w, 0.6, 3)), (0, 1))(X, W)
    for i, leaf in enumerate((X, W)):
        slope = np.zeros_like(leaf)
        for at in np.ndindex(leaf.shape):
            values = []
            for step in (1e-6, -1e-6):
                moved = [X.copy(), W.copy()]
                moved[i][at] += step
                values.append(weighed(*expected(*moved, 0.6)))
            slope[at] = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(found[i], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [1, 2])
def test_cross_entropy_is_their_weighted_sum(chunks):
    """Value and gradient, in float32 and bfloat16."""
    weights = jnp.asarray(RNG.integers(0, 2, (B, T)) * 0.5 + 0.5, jnp.float32)
    fused = lambda h: loss.cross_entropy(h, TARGETS, weights, ONE, chunks)[0]
    summed = lambda h: -jnp.sum(weights * logprobs.token_logprobs(h, TARGETS, ONE, chunks=chunks))
    for dtype, bound in (("float32", 2e-6), ("bfloat16", 2**-8)):
        hidden = Hidden(jnp.asarray(X, dtype), jnp.asarray(W, dtype))
        (a, da), (b, db) = (jax.value_and_grad(f)(hidden) for f in (fused, summed))
        np.testing.assert_allclose(a, b, rtol=1e-6)
        for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
            assert x.dtype == y.dtype == dtype
            x, y = (np.asarray(g, np.float64) for g in (x, y))
            np.testing.assert_allclose(x, y, atol=bound * np.abs(x).max())


def test_a_quantised_matrix_gives_states_a_gradient():
    cut = rounding.grid("DV", W.shape, 0)
    w = rounding.nearest(jnp.asarray(W, jnp.float32), cut, 8)
    assert isinstance(w, Quantised)
    total = lambda x, w: jnp.sum(logprobs.token_logprobs(Hidden(x, w), TARGETS, ONE, 0.6, 2))
    found, dense = (
        jax.grad(total)(jnp.asarray(X, jnp.float32), of) for of in (w, w.dense(jnp.float32))
    )
    np.testing.assert_allclose(found, dense, rtol=1e-4, atol=1e-5)


def test_logits_of_all_positions_never_exist():
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, 60, D), (D, 400)))
    ids = jax.ShapeDtypeStruct((B, 60), jnp.int32)
    total = lambda x, w, t: sum(
        jnp.sum(one) for one in logprobs.token_logprobs_and_entropy(Hidden(x, w), t, ONE, 1.0, 10)
    )
    memory = jax.jit(jax.grad(total, (0, 1))).lower(x, w, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < B * 60 * 400 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(chunks=4), "chunks=4 must divide the 6 positions; try 3"),
        (dict(temperature=0.0), "temperature=0.0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        logprobs.token_logprobs(
            Hidden(jnp.zeros((B, T, D)), jnp.zeros((D, V))), TARGETS, ONE, **settings
        )


def test_chunks_are_the_fewest_within_the_limit():
    hidden = Hidden(jnp.zeros((B, T, D)), jnp.zeros((D, V)))
    bytes_ = 4 * B * T * V
    for limit, chunks in ((bytes_, 1), (bytes_ - 1, 2), (bytes_ // 4, 6), (1, 6)):
        assert logprobs.chunks_within(hidden, limit) == chunks
