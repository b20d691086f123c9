import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.model.transformer import Hidden
from llama_jax.train import loss
from tests import oracle

B, T, D, V = 2, 6, 5, 41
ONE = sharding.make(config.Mesh(), jax.devices()[:1])


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    hidden = Hidden(rng.normal(size=(B, T, D)), rng.normal(size=(D, V)) * 2)
    weights = rng.integers(0, 2, (B, T)) * 0.5 + 0.5
    weights[1, 4:] = 0
    return hidden, rng.integers(0, V, (B, T)), weights


def expected(hidden, targets, weights, z_loss):
    logits = hidden.x_BTD @ hidden.w_DV
    nll = np.stack([oracle.cross_entropy(logits[b], targets[b]) for b in range(B)])
    log_z = np.log(np.exp(logits).sum(-1))
    return np.sum(weights * (nll + z_loss * log_z**2)), np.sum(weights * nll)


def ours(hidden, targets, weights, chunks, z_loss):
    hidden = Hidden(*(jnp.asarray(leaf, jnp.float32) for leaf in hidden))
    return loss.cross_entropy(
        hidden, targets, jnp.asarray(weights, jnp.float32), ONE, chunks, z_loss
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunks", [1, 2, 6])
def test_sums_are_the_formula(case, chunks, z_loss):
    np.testing.assert_allclose(ours(*case, chunks, z_loss), expected(*case, z_loss), rtol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunks", [1, 3])
def test_gradient_is_the_slope_of_the_formula(case, chunks, z_loss):
    hidden, targets, weights = case
    total = lambda h: 3 * ours(h, targets, weights, chunks, z_loss)[0]
    gradient = jax.grad(total)(Hidden(*(jnp.asarray(leaf, jnp.float32) for leaf in hidden)))
    for i, leaf in enumerate(hidden):
        slope = np.zeros_like(leaf)
        for at in np.ndindex(leaf.shape):
            values = []
            for step in (1e-6, -1e-6):
                moved = [part.copy() for part in hidden]
                moved[i][at] += step
                values.append(3 * expected(Hidden(*moved), targets, weights, z_loss)[0])
            slope[at] = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(gradient[i], slope, rtol=2e-4, atol=2e-4)


def test_logits_of_the_whole_batch_never_exist():
    x = jax.ShapeDtypeStruct((B, 60, D), jnp.float32)
    w = jax.ShapeDtypeStruct((D, 400), jnp.float32)
    ids = jax.ShapeDtypeStruct((B, 60), jnp.int32)
    total = lambda x, w, t: loss.cross_entropy(Hidden(x, w), t, jnp.ones((B, 60)), ONE, 10)[0]
    memory = jax.jit(jax.grad(total, (0, 1))).lower(x, w, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < B * 60 * 400 * 4


def test_a_loss_of_logits_in_the_thousands_is_finite():
    hidden = Hidden(jnp.full((1, 1, 1), 1e4), jnp.asarray([[1.0, 0.5, -1.0]]))
    total, _ = loss.cross_entropy(hidden, jnp.asarray([[1]]), jnp.ones((1, 1)), ONE)
    assert float(total) == pytest.approx(5e3)
