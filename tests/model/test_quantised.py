"""Products with whole numbers are those of the matrix that they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.quantised import Quantised, product

RNG = np.random.default_rng(0)
SHAPES = {  # letters: (x, values, whole channels, blocks)
    "BTD,DNH->BNTH": ((2, 5, 24), (24, 3, 4), (1, 3, 4), (6, 3, 4)),
    "BNTH,NHD->BTD": ((2, 6, 5, 4), (6, 4, 24), (1, 1, 24), (6, 2, 24)),
    "BTF,FD->BTD": ((2, 1, 40), (40, 24), (1, 24), (5, 24)),
}


def made(letters, blocks, bits=8, activations="compute"):
    x, values = SHAPES[letters][:2]
    low, high = (-127, 128) if bits == 8 else (-8, 8)
    w = Quantised(
        jnp.asarray(RNG.integers(low, high, values), f"int{bits}"),
        jnp.asarray(RNG.uniform(0.5, 2, blocks), jnp.bfloat16),
        activations,
    )
    return jnp.asarray(RNG.normal(size=x), jnp.float32), w


def dense(w):
    """float64, each value with the scale of its block, one at a time."""
    out = np.zeros(w.shape)
    size = [n // m for n, m in zip(w.shape, w.scale.shape, strict=True)]
    values, scale = np.asarray(w.values.astype(jnp.int8)), np.asarray(w.scale, np.float64)
    for at in np.ndindex(w.shape):
        out[at] = values[at] * scale[tuple(i // n for i, n in zip(at, size, strict=True))]
    return out


@pytest.mark.parametrize("letters", SHAPES)
@pytest.mark.parametrize(("bits", "kind"), [(8, 2), (4, 2), (4, 3)])
def test_a_product_is_that_of_values_times_scales(letters, bits, kind):
    x, w = made(letters, SHAPES[letters][kind], bits)
    wanted = np.einsum(letters, np.asarray(x, np.float64), dense(w))
    np.testing.assert_allclose(product(letters, x, w), wanted, atol=2e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(w.dense(jnp.float32), dense(w), rtol=1e-6)


@pytest.mark.parametrize("letters", SHAPES)
def test_sixteen_bits_of_x_are_lost_in_the_last_of_them(letters):
    """x is off by half of a 127 x 254th of its largest entry, at most, at each position."""
    x, w = made(letters, SHAPES[letters][2], activations="int16")
    inputs = letters.split(",")[0]
    exact, rows = np.asarray(x, np.float64), np.moveaxis(np.abs(x), inputs.index("T"), 1)
    largest = rows.reshape(*rows.shape[:2], -1).max(-1)
    half_BT = largest / (2 * 127 * 254)
    inputs, weights, outputs = letters.replace("->", ",").split(",")
    bound = np.einsum(f"BT,{weights}->{outputs}", half_BT, np.abs(dense(w)))
    missed = np.abs(product(letters, x, w) - np.einsum(letters, exact, dense(w)))
    assert (missed <= bound * 1.01 + 1e-5).all()
    assert missed.max() > 0


def test_the_largest_numbers_do_not_overflow():
    """28,672 products of 127 x 127, the widest of the family."""
    w = Quantised(jnp.full((28672, 2), 127, jnp.int8), jnp.ones((1, 2), jnp.bfloat16), "int16")
    found = product("BTF,FD->BTD", jnp.full((1, 1, 28672), -3.0), w)
    np.testing.assert_allclose(found, -3.0 * 28672 * 127, rtol=1e-6)


def test_rows_of_zeros_stay_zeros():
    _, w = made("BTF,FD->BTD", (1, 24), activations="int16")
    assert not product("BTF,FD->BTD", jnp.zeros((2, 1, 40)), w).any()
