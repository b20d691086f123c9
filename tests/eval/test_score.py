import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import config, sharding
from llama_jax.eval import score
from llama_jax.model import transformer
from tests import oracle, parameters


def network(model, layout):
    module = transformer.build(model, layout)
    return module, parameters.drawn(module, lambda leaf: leaf * 8)


def rows(model, number=6, length=10):
    """Rows that each begin with the last token of the one before, as packing makes them."""
    stream = np.random.default_rng(0).integers(0, model.vocab_size, number * length + 1)
    return np.stack([stream[i * length : (i + 1) * length + 1] for i in range(number)])


@pytest.mark.parametrize("limit", [score.LOGITS_BYTES, 1000])
def test_nats_are_the_cross_entropy_of_the_logits(model, layout, monkeypatch, limit):
    monkeypatch.setattr(score, "LOGITS_BYTES", limit)
    score.token_nll.clear_cache()
    module, params = network(model, layout)
    tokens = rows(model)
    positions = np.broadcast_to(np.arange(10), (6, 10))
    hidden = module.apply({"params": params}, tokens[:, :-1], positions)
    logits = np.asarray(transformer.logits(hidden), np.float64)
    expected = [oracle.cross_entropy(logits[i], tokens[i, 1:]) for i in range(6)]
    ours = score.token_nll(module, params, jnp.asarray(tokens))
    # The difference of two numbers near 25, each rounded to 2e-6.
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=4e-6)
    score.token_nll.clear_cache()


def test_longer_windows_score_the_same_tokens_with_more_before_them(model, layout):
    module, params = network(dataclasses.replace(model, position="none"), layout)
    tokens = rows(model)
    once = score.windows(module, params, tokens, 1, 20)
    twice = score.windows(module, params, tokens, 2, 20)
    assert once.row_R.shape == twice.row_R.shape == (6,)
    assert (once.position_T.shape, twice.position_T.shape) == ((10,), (20,))
    # The first row of a window has nothing more before it, the second one has.
    np.testing.assert_allclose(once.row_R[::2], twice.row_R[::2], rtol=1e-5)
    assert np.abs(once.row_R[1::2] - twice.row_R[1::2]).min() > 1e-4
    whole = score.windows(module, params, tokens, 6, 1)
    stream = np.concatenate([tokens[0, :1], tokens[:, 1:].ravel()])
    direct = score.token_nll(module, params, jnp.asarray(stream)[None])
    np.testing.assert_allclose(whole.position_T, direct[0], rtol=1e-6)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_of_other_devices_and_lengths_does_not_matter(model, layout, kernel):
    """Neither runs on a CPU, and splash takes multiples of 128 alone."""
    module, params = network(model, layout)
    tokens = rows(model)[:2]
    expected = score.windows(module, params, tokens, 1, 20).row_R
    trained, _ = network(dataclasses.replace(model, kernel=kernel), layout)
    np.testing.assert_array_equal(score.windows(trained, params, tokens, 1, 20).row_R, expected)


@pytest.mark.slow
def test_meshes_have_the_numbers_of_one_device(layout):
    model = config.Model(
        vocab_size=44, dim=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=20,
        compute_dtype="float32",
    )  # fmt: skip
    found = []
    for where in (layout, sharding.make(config.Mesh(fsdp=4, tensor=2), jax.devices())):
        module, params = network(model, where)
        found.append(score.windows(module, params, rows(model), 2, 20).row_R)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
