"""Which values share a scale, and that what is chosen is the nearest there is."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.quant import rounding

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("letters", "shape", "group", "blocks"),
    [
        ("DNH", (64, 8, 8), 32, (2, 8, 8)),
        ("DF", (64, 172), 0, (1, 172)),
        ("FD", (172, 64), 32, (4, 64)),  # by 43: 32 does not divide 172
        ("FD", (1706, 640), 32, (2, 640)),  # by 853: by 2, a scale would take as much as its values
        ("NHD", (8, 8, 64), 32, (2, 1, 64)),  # four heads together
        ("NHD", (4, 128, 64), 32, (4, 4, 64)),
        ("NHD", (6, 4, 24), 0, (1, 1, 24)),
        ("DV", (64, 512), 0, (1, 512)),
        ("VD", (512, 64), 0, (512, 1)),
    ],
)
def test_blocks_are_of_values_that_are_added_up(letters, shape, group, blocks):
    assert rounding.grid(letters, shape, group).blocks == blocks


def test_eight_bits_miss_by_half_a_step_at_most():
    w = RNG.normal(size=(24, 10)) * np.logspace(-6, 6, 10)
    made = rounding.nearest(jnp.asarray(w, jnp.float32), rounding.grid("DF", w.shape, 0), 8)
    step = np.abs(w).max(0) / 127
    assert made.values.dtype == jnp.int8
    # bfloat16 scales are up to a 128th larger.
    assert (np.abs(made.dense(jnp.float32) - w) <= step * (1 + 2**-7) / 2 * 1.001).all()


def test_four_bits_have_the_least_error_of_many_scales():
    w = RNG.normal(size=(64, 9))
    made = rounding.nearest(jnp.asarray(w, jnp.float32), rounding.grid("DF", w.shape, 32), 4)
    assert made.scale.shape == (2, 9)
    found = np.square(made.dense(jnp.float32) - w).reshape(2, 32, 9).sum(1)
    blocks = w.reshape(2, 32, 9)

    def error(scale):
        return np.square(blocks - np.clip(np.round(blocks / scale), -8, 7) * scale).sum(1)

    largest = np.abs(blocks).max(1, keepdims=True)
    least = np.min(
        [
            error(sign * largest / 8 * share)
            for sign in (1, -1)
            for share in np.linspace(0.4, 1.2, 400)
        ],
        0,
    )
    assert (found <= 1.05 * least).all()  # of 24 scales instead of 400
    assert found.sum() < 0.9 * error(largest / 7).sum()  # the plain choice


def test_a_block_of_zeros_stays_zeros():
    w = jnp.zeros((32, 3)).at[:, 1].set(1.0)
    for bits in (8, 4):
        made = rounding.nearest(w, rounding.grid("DF", w.shape, 32), bits)
        np.testing.assert_allclose(made.dense(jnp.float32), w, rtol=0.01)
