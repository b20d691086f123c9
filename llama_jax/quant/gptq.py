"""GPTQ (arXiv:2210.17323): what rounding does to a product is made good by the values not yet rounded."""

import functools
import math

import jax
import jax.numpy as jnp

from llama_jax.model.quantised import Quantised
from llama_jax.quant import rounding
from llama_jax.quant.rounding import Grid

DAMPING = 0.01  # of the mean of the Hessian's diagonal (section 3.3, step 3)


@functools.partial(jax.jit, static_argnames=("cut", "bits"))
def gptq(w: jax.Array, hessian_CC: jax.Array, cut: Grid, bits: int) -> Quantised:
    """w, whose contracted letters (C together) come first, for inputs x with sum x x' = hessian_CC.

    Algorithm 1 with one value of each channel at a time. Those that matter most are rounded first, while
    others can make it good; scales are chosen before, by error times the Hessian's diagonal.
    """
    C = math.prod(w.shape[: cut.contracted])
    w_CO = w.astype(jnp.float32).reshape(C, -1)
    importance_C = jnp.diagonal(hessian_CC)
    blocks = math.prod(cut.blocks[: cut.contracted])
    scale_XO = rounding.best_scale(
        w_CO.reshape(blocks, C // blocks, -1), importance_C.reshape(blocks, -1, 1), (1,), bits
    )[:, 0]
    order_C = jnp.argsort(-importance_C)
    damping = DAMPING * jnp.mean(importance_C) + 1e-30
    factor_CC = inverse_factor(hessian_CC[order_C][:, order_C] + damping * jnp.eye(C))
    scale_CO = jnp.repeat(scale_XO, C // blocks, axis=0)[order_C]

    def one(i, state):
        w_CO, values_CO = state
        whole_O = rounding.whole(w_CO[i], scale_CO[i], bits)
        error_O = (w_CO[i] - scale_CO[i] * whole_O) / factor_CC[i, i]
        # Row i of the factor has nothing before i: what is rounded stays.
        w_CO = w_CO - factor_CC[i][:, None] * error_O
        return w_CO, values_CO.at[i].set(whole_O.astype(jnp.int8))

    start = (w_CO[order_C], jnp.zeros(w_CO.shape, jnp.int8))
    _, values_CO = jax.lax.fori_loop(0, C, one, start)
    values = jnp.zeros_like(values_CO).at[order_C].set(values_CO).reshape(w.shape)
    return Quantised(values.astype(f"int{bits}"), scale_XO.reshape(cut.blocks).astype(jnp.bfloat16))


def inverse_factor(h_CC: jax.Array) -> jax.Array:
    """Upper U with U' U = 1 / h, without inverting h: h = R R' with R upper, and U = 1 / R."""
    turned = jnp.linalg.cholesky(h_CC[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(turned, jnp.eye(len(h_CC)), lower=False)
