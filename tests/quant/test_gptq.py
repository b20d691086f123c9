"""GPTQ beside the paper's update, one value at a time, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.quant import gptq, rounding

C, OUT, ROWS = 32, 5, 300


def inputs(C):
    """Inputs that depend on one another, a matrix, and the sum of x x'."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(C, C)) * np.logspace(0, -1, C)
    x = rng.normal(size=(ROWS, C)) @ mix
    w = rng.normal(size=(C, OUT))
    return x, w, x.T @ x


@pytest.fixture(scope="module")
def problem():
    return inputs(C)


def by_the_paper(w, hessian, scale):
    """arXiv:2210.17323 eq. 2 and 3: round the value that matters most, let the free ones make it good
    with the inverse of their Hessian, take it out of the inverse."""
    w, C = w.copy(), len(w)
    damped = hessian + gptq.DAMPING * np.diag(hessian).mean() * np.eye(C)
    values, free = np.zeros(w.shape), list(np.argsort(-np.diag(hessian), kind="stable"))
    while free:
        inverse = np.linalg.inv(damped[np.ix_(free, free)])
        at = free[0]
        values[at] = np.clip(np.round(w[at] / scale[at]), -8, 7)
        error = (w[at] - values[at] * scale[at]) / inverse[0, 0]
        w[free] -= np.outer(inverse[:, 0], error)
        free = free[1:]
    return values


@pytest.mark.parametrize(("group", "C"), [(0, C), (8, C), (32, 192)])
def test_values_are_the_papers(group, C):
    """192 rows are rounded 96 at a time."""
    x, w, hessian = inputs(C)
    cut = rounding.grid("DF", w.shape, group)
    made = gptq.gptq(jnp.asarray(w, jnp.float32), jnp.asarray(hessian, jnp.float32), cut, 4)
    scale = np.repeat(np.asarray(made.scale, np.float64), C // cut.blocks[0], axis=0)
    wanted = by_the_paper(w, hessian, scale)
    found = np.asarray(made.values.astype(jnp.int8))
    assert (found == wanted).mean() > 0.98  # float32 rounds a value near a half the other way
    missed = [np.square(x @ (v * scale - w)).sum() for v in (found, wanted)]
    assert missed[0] == pytest.approx(missed[1], rel=0.02)


def test_products_are_nearer_than_by_rounding(problem):
    x, w, hessian = problem
    cut = rounding.grid("DF", w.shape, 8)
    plain = rounding.nearest(jnp.asarray(w, jnp.float32), cut, 4)
    made = gptq.gptq(jnp.asarray(w, jnp.float32), jnp.asarray(hessian, jnp.float32), cut, 4)
    missed = [np.square(x @ (np.asarray(m.dense(jnp.float32)) - w)).sum() for m in (made, plain)]
    assert missed[0] < 0.5 * missed[1]


def test_values_whose_inputs_never_come_are_those_of_plain_rounding(problem):
    """One value of the first group, and the whole of the second."""
    _, w, hessian = problem
    silent, cut = hessian.copy(), rounding.grid("DF", w.shape, 8)
    for at in (3, slice(8, 16)):
        silent[at], silent[:, at] = 0, 0
    w, silent = jnp.asarray(w, jnp.float32), jnp.asarray(silent, jnp.float32)
    made, plain = gptq.gptq(w, silent, cut, 4), rounding.nearest(w, cut, 4)
    found, wanted = (np.asarray(m.dense(jnp.float32)) for m in (made, plain))
    np.testing.assert_array_equal(found[8:16], wanted[8:16])
    step = np.asarray(jnp.abs(made.scale[0].astype(jnp.float32)))
    assert (np.abs(found[3] - w[3]) <= np.maximum(step / 2, np.abs(w[3]) - 7 * step) * 1.01).all()


def test_the_factor_is_of_the_inverse(problem):
    hessian = problem[2] + np.eye(C)
    factor = np.asarray(gptq.inverse_factor(jnp.asarray(hessian, jnp.float32)), np.float64)
    assert not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(C), atol=2e-3)
