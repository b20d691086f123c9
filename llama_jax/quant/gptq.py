"""GPTQ (arXiv:2210.17323): what rounding does to a product is made good by the values not yet rounded."""

import functools
import math

import jax
import jax.numpy as jnp

from llama_jax.model.quantised import Quantised
from llama_jax.quant import rounding
from llama_jax.quant.rounding import Grid

DAMPING = 0.01  # of the mean of the Hessian's diagonal (section 3.3, step 3)
TOGETHER = 128  # rows that are rounded before the others learn of it (section 3.3, step 2)


@functools.partial(jax.jit, static_argnames=("cut", "bits"))
def gptq(w: jax.Array, hessian_CC: jax.Array, cut: Grid, bits: int) -> Quantised:
    """w, whose contracted letters (C together) come first, for inputs x with sum x x' = hessian_CC.

    Algorithm 1, with two choices of ours: the values that matter most, by the Hessian's diagonal, are rounded
    first, while others can make it good; scales are chosen before, by error times that diagonal.
    """
    C = math.prod(w.shape[: cut.contracted])
    w_CO = w.astype(jnp.float32).reshape(C, -1)
    seen_C = jnp.diagonal(hessian_CC)
    damping = DAMPING * jnp.mean(seen_C) + 1e-30
    importance_C = seen_C + damping
    blocks = math.prod(cut.blocks[: cut.contracted])
    scale_XO = rounding.best_scale(
        w_CO.reshape(blocks, C // blocks, -1), importance_C.reshape(blocks, -1, 1), (1,), bits
    )[:, 0]
    order_C = jnp.argsort(-importance_C)
    factor_CC = inverse_factor(hessian_CC[order_C][:, order_C] + damping * jnp.eye(C))
    scale_CO = jnp.repeat(scale_XO, C // blocks, axis=0)[order_C]
    size = max(n for n in rounding.divisors(C) if n <= TOGETHER)

    def rows(i, state):
        """`size` rows are rounded; all that come after make good what that did."""
        w_CO, values_CO = state
        own = lambda of: jax.lax.dynamic_slice_in_dim(of, i * size, size)  # noqa: E731
        factor_RC = own(factor_CC)
        factor_RR = jax.lax.dynamic_slice_in_dim(factor_RC, i * size, size, axis=1)
        values_RO, errors_RO = _round_rows(own(w_CO), own(scale_CO), factor_RR, bits)
        # A row of the factor has nothing before its own place: what is rounded is not read again.
        w_CO = w_CO - jnp.einsum("RC,RO->CO", factor_RC, errors_RO, precision="highest")
        return w_CO, jax.lax.dynamic_update_slice_in_dim(values_CO, values_RO, i * size, axis=0)

    start = (w_CO[order_C], jnp.zeros(w_CO.shape, jnp.int8))
    _, values_CO = jax.lax.fori_loop(0, C // size, rows, start)
    values = jnp.zeros_like(values_CO).at[order_C].set(values_CO).reshape(w.shape)
    return Quantised(values.astype(f"int{bits}"), scale_XO.reshape(cut.blocks).astype(jnp.bfloat16))


def _round_rows(w_RO, scale_RO, factor_RR, bits: int) -> tuple[jax.Array, jax.Array]:
    """Whole numbers, int8, and what the rows after them are to make good: eq. 2, one row after another."""

    def one(r, state):
        w_RO, values_RO, errors_RO = state
        whole_O = rounding.whole(w_RO[r], scale_RO[r], bits)
        error_O = (w_RO[r] - scale_RO[r] * whole_O) / factor_RR[r, r]
        w_RO = w_RO - factor_RR[r][:, None] * error_O
        return w_RO, values_RO.at[r].set(whole_O.astype(jnp.int8)), errors_RO.at[r].set(error_O)

    none = (w_RO, jnp.zeros(w_RO.shape, jnp.int8), jnp.zeros_like(w_RO))
    return jax.lax.fori_loop(0, len(w_RO), one, none)[1:]


def inverse_factor(h_CC: jax.Array) -> jax.Array:
    """Upper U with U' U = 1 / h, without inverting h: h = R R' with R upper, and U = 1 / R."""
    turned = jnp.linalg.cholesky(h_CC[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(turned, jnp.eye(len(h_CC)), lower=False)
