"""Keys and values of the text so far, so that a new token costs the work of one position.

A cache is the collection "cache" of a network's variables: for each layer the keys and values of S places in
each of B rows. The token at position p of a row is kept at place p mod S: as long as a row has at most S
tokens they are all there, after that the oldest gives way. A row is extended at its end, or from any earlier
position on, whose later tokens are then forgotten.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.model import kernels
from llama_jax.model.kernels import Scores

CACHE = "cache"
FEW = 16  # rows that are written one by one


def empty(module, rows: int, places: int, kind: str) -> dict[str, Any]:
    """The cache of a network (`unstacked`) before the first token. `kind`: a dtype, or "int8".

    int8 has a float32 scale for each key and value of a head.
    """
    model, layout = module.config, module.layout
    heads = layout.key_heads(model.kv_heads)
    dtype = jnp.dtype(kind)
    entries = (dtype, (rows, heads, places, model.head_dim), "BKSH")
    shapes = {"k": entries, "v": entries}
    if kind == "int8":
        scales = (jnp.dtype("float32"), (rows, heads, places), "BKS")
        shapes |= {"k_scale": scales, "v_scale": scales}
    layout.check_rows(rows)
    zeros = lambda: {  # noqa: E731
        f"group_{i}": {
            f"{block}_{j}": {
                "attention": {name: jnp.zeros(shape, of) for name, (of, shape, _) in shapes.items()}
            }
            for j, block in enumerate(model.pattern)
        }
        for i in range(model.groups)
    }
    letters = {name: letters for name, (_, _, letters) in shapes.items()}
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, _: layout.cache(letters[path[-1].key]), jax.eval_shape(zeros)
    )
    return jax.jit(zeros, out_shardings=shardings)()


def attend(module, q_BNTH, k_BKTH, v_BKTH, positions_BT, segments_BT, scores: Scores):
    """Keep new keys and values, and attend to all that are kept: [B, N, T, H].

    Tokens of segment 0 are padding: they are not kept, and what comes out for them means nothing. Positions
    of the others rise by one.
    """
    q_BNTH, k_BKTH, v_BKTH = module.layout.heads(q_BNTH, k_BKTH, v_BKTH)
    real_BT = segments_BT > 0
    k_BKSH = _kept(module, "k", k_BKTH, positions_BT, real_BT)
    v_BKSH = _kept(module, "v", v_BKTH, positions_BT, real_BT)
    S = k_BKSH.shape[2]
    last_B1 = jnp.max(jnp.where(real_BT, positions_BT, -1), axis=1, keepdims=True)
    kept_BS = last_B1 - (last_B1 - jnp.arange(S)) % S  # the position whose token each place holds
    back_BTS = positions_BT[:, :, None] - kept_BS[:, None, :]
    visible_BTS = (kept_BS[:, None, :] >= 0) & (back_BTS >= 0)
    if scores.window:
        visible_BTS &= back_BTS < scores.window
    bias_BNTS = None
    if scores.bias_NS is not None:
        bias_BNTS = jnp.moveaxis(scores.bias_NS[:, jnp.clip(back_BTS, 0, S - 1)], 0, 1)
    return kernels.attend(q_BNTH, k_BKSH, v_BKSH, visible_BTS, scores.softcap, bias_BNTS)


def _kept(module, name, new_BKTH, positions_BT, real_BT):
    """All keys, or values, of the rows, in the dtype of the new ones."""
    held = module.get_variable(CACHE, name)
    S = held.shape[2]
    places_BT = jnp.where(real_BT, positions_BT % S, S)  # beyond the last place nothing is written
    if held.dtype != jnp.int8:
        held = _write(held, new_BKTH.astype(held.dtype), places_BT)
        module.put_variable(CACHE, name, held)
        return held.astype(new_BKTH.dtype)
    scale = module.get_variable(CACHE, f"{name}_scale")
    new_scale_BKT = jnp.max(jnp.abs(new_BKTH.astype(jnp.float32)), axis=-1) / 127
    whole_BKTH = new_BKTH / jnp.maximum(new_scale_BKT, 1e-30)[..., None]
    held = _write(held, jnp.round(whole_BKTH).astype(jnp.int8), places_BT)
    scale = _write(scale, new_scale_BKT, places_BT)
    module.put_variable(CACHE, name, held)
    module.put_variable(CACHE, f"{name}_scale", scale)
    return (held.astype(jnp.float32) * scale[..., None]).astype(new_BKTH.dtype)


def _write(held, new, places_BT):
    """held [B, K, S, ...] with new [B, K, T, ...] at the places of each row."""
    B, T = places_BT.shape
    if T == 1 and B <= FEW:
        return _write_each(held, new, places_BT)
    rows_B1 = jnp.arange(B)[:, None]
    return held.at[rows_B1, :, places_BT].set(jnp.moveaxis(new, 1, 2), mode="drop")


def _write_each(held, new, places_B1):
    """One row after another, in place: a scatter makes XLA:CPU copy the cache.

    Padding, the token of an idle row, goes to the last place, which decode/engine.py leaves free.
    """
    for row in range(held.shape[0]):
        start = (row, 0, places_B1[row, 0], *(0,) * (held.ndim - 3))
        held = jax.lax.dynamic_update_slice(held, new[row : row + 1], start)
    return held
