"""Look up rows of a table: the embedding of tokens, the learned vectors of positions.

The gradient of a row is a sum over every place where it was looked up, thousands for a frequent token. It is
accumulated in float32: in bfloat16 a sum of equal addends stops growing at 256 of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.model.quantised import Quantised
from llama_jax.sharding import Layout


def look_up(
    table: jax.Array | Quantised,
    index_BT: jax.Array,
    layout: Layout,
    letters: str,
    dtype: DTypeLike,
) -> jax.Array:
    """`table[index_BT]`, [B, T, D], in `dtype`. Letters of the table: "VD" or "RD".

    An array has that dtype already. The scales of a quantised table are one for each row.
    """
    if isinstance(table, Quantised):
        scale_BT1 = table.scale[index_BT].astype(jnp.float32)
        return (table.values[index_BT].astype(jnp.float32) * scale_BT1).astype(dtype)
    return _look_up(table, index_BT, layout, letters, len(table))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _look_up(table, index_BT, layout, letters, rows) -> jax.Array:
    return table[index_BT]


def _forward(table, index_BT, layout, letters, rows):
    return table[index_BT], index_BT


def _backward(layout, letters, rows, index_BT, slope_BTD):
    """The float32 sums lie where the parameter is kept, D over fsdp: a shard of the table on each device."""
    sums = layout.rest(jnp.zeros((rows, slope_BTD.shape[-1]), jnp.float32), letters)
    sums = layout.rest(sums.at[index_BT].add(slope_BTD.astype(jnp.float32)), letters)
    return sums.astype(slope_BTD.dtype), None


_look_up.defvjp(_forward, _backward)
