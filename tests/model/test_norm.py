import jax.numpy as jnp
import numpy as np

from llama_jax.model import norm
from tests import oracle


def test_rms_norm_is_the_papers():
    x = np.random.default_rng(0).normal(3, 5, (2, 7, 24))
    scale = np.linspace(-1, 2, 24)
    ours = norm.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-5)
    np.testing.assert_allclose(ours, oracle.rms_norm(x, scale, 1e-5), rtol=2e-6, atol=1e-6)


def test_eps_counts_for_small_inputs():
    x = np.full((1, 1, 4), 1e-3)
    ours = norm.rms_norm(jnp.asarray(x, jnp.float32), jnp.ones(4), 1e-5)
    np.testing.assert_allclose(ours, 1e-3 / np.sqrt(1e-6 + 1e-5), rtol=1e-6)


def test_bfloat16_input_has_float32_statistics():
    # In bfloat16 the mean square of 1 and 1/16 over 4096 entries would stop growing at 256.
    x = jnp.concatenate([jnp.ones(2048), jnp.full(2048, 1 / 16)]).astype(jnp.bfloat16)[None]
    ours = norm.rms_norm(x, jnp.ones(4096, jnp.bfloat16), 1e-6)
    exact = 1 / np.sqrt((1 + 1 / 256) / 2 + 1e-6)
    assert abs(float(ours[0, 0]) / exact - 1) < 2**-8
    assert ours.dtype == jnp.bfloat16


def test_layer_norm_centres_and_shifts():
    x = np.random.default_rng(1).normal(3, 5, (2, 7, 24))
    scale, bias = np.linspace(-1, 2, 24), np.linspace(0, 1, 24)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    ours = norm.layer_norm(*(jnp.asarray(a, jnp.float32) for a in (x, scale, bias)), 1e-5)
    np.testing.assert_allclose(ours, expected, rtol=5e-6, atol=2e-6)
