"""Keys and values of the text so far, so that a new token costs the work of one position.

A cache is the collection "cache" of a network's variables: for each layer the keys and values of S places in
each of B rows. The token at position p of a row is kept at place p mod S: as long as a row has at most S
tokens they are all there, after that the oldest gives way. A row is extended at its end, or from any earlier
position on, whose later tokens are then forgotten.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.model import kernels
from llama_jax.model.kernels import Scores

CACHE = "cache"
FEW = 16  # rows that are written one by one
# How each part lies: keys as the product with queries reads them, else XLA:CPU turns them at each token.
LETTERS = {"k": "BKHS", "v": "BKSH", "k_scale": "BKS", "v_scale": "BKS"}


def empty(module, rows: int, places: int, kind: str) -> dict[str, Any]:
    """The cache of a network (`unstacked`) before the first token. `kind`: a dtype, or "int8".

    int8 has a float32 scale for each key and value of a head.
    """
    shapes = abstract(module, rows, places, kind)
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
    return jax.jit(zeros, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()


def abstract(module, rows: int, places: int, kind: str) -> dict[str, Any]:
    """Shapes, types and places of a cache; no memory."""
    model, layout = module.config, module.layout
    layout.check_rows(rows)
    heads = layout.key_heads(model.kv_heads)
    size = {"B": rows, "K": heads, "S": places, "H": model.head_dim}
    dtypes = {"k": jnp.dtype(kind), "v": jnp.dtype(kind)}
    if kind == "int8":
        dtypes |= {"k_scale": jnp.dtype("float32"), "v_scale": jnp.dtype("float32")}
    of_layer = {
        name: jax.ShapeDtypeStruct(
            [size[letter] for letter in LETTERS[name]], dtype, sharding=layout.cache(LETTERS[name])
        )
        for name, dtype in dtypes.items()
    }
    blocks = {f"{block}_{j}": {"attention": of_layer} for j, block in enumerate(model.pattern)}
    return {f"group_{i}": blocks for i in range(model.groups)}


def placed(layout, kept: Any) -> Any:
    """A cache, constrained inside jit to where `empty` puts it."""
    constrain = jax.lax.with_sharding_constraint
    return jax.tree_util.tree_map_with_path(
        lambda path, held: constrain(held, layout.cache(LETTERS[path[-1].key])), kept
    )


def places_of(kept: Any) -> int:
    """S of a cache, with rows or without."""
    return next(leaf for path, leaf in tree.paths(kept).items() if path.endswith("/k")).shape[-1]


def without_rows(kept: Any) -> Any:
    """The cache of one row without B, for calls of one token: with B, XLA:CPU copies half of it each time."""
    return jax.tree.map(lambda held: held[0], kept)


def with_rows(kept: Any) -> Any:
    """The inverse."""
    return jax.tree.map(lambda held: held[None], kept)


def attend(module, q_BNTH, k_BKTH, v_BKTH, positions_BT, segments_BT, scores: Scores):
    """Keep new keys and values, and attend to all that are kept: [B, N, T, H].

    Tokens of segment 0 are padding: they are not kept, and what comes out for them means nothing. Positions
    of the others rise by one.
    """
    q_BNTH, k_BKTH, v_BKTH = module.layout.heads(q_BNTH, k_BKTH, v_BKTH)
    real_BT = segments_BT > 0
    k_BKHT = jnp.einsum("BKTH->BKHT", k_BKTH)
    k_BKSH = jnp.einsum("BKHS->BKSH", _kept(module, "k", k_BKHT, positions_BT, real_BT))
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


def _kept(module, name, new, positions_BT, real_BT):
    """All keys, or values, of the rows, in the letters and the dtype of the new ones."""
    held = module.get_variable(CACHE, name)
    S = held.shape[LETTERS[name].index("S") - len(LETTERS[name])]
    places_BT = jnp.where(real_BT, positions_BT % S, S)  # beyond the last place nothing is written

    def extended(name, new):
        held = module.get_variable(CACHE, name)
        held = _write(held, new.astype(held.dtype), LETTERS[name], places_BT)
        module.put_variable(CACHE, name, held)
        return held if held.ndim == new.ndim else held[None]

    if held.dtype != jnp.int8:
        return extended(name, new).astype(new.dtype)
    of_head = LETTERS[name].index("H")
    scale_BKT = jnp.max(jnp.abs(new.astype(jnp.float32)), axis=of_head) / 127
    whole = jnp.round(new / jnp.expand_dims(jnp.maximum(scale_BKT, 1e-30), of_head))
    values, scale_BKS = extended(name, whole), extended(f"{name}_scale", scale_BKT)
    return (values * jnp.expand_dims(scale_BKS, of_head)).astype(new.dtype)


def _write(held, new, letters, places_BT):
    """`held`, with B or of one row without, extended by `new`, which has T in the place of S.

    Padding, the token of an idle row, goes nowhere where several are written at once; else to the last
    place, which decode/engine.py leaves free.
    """
    B, T = places_BT.shape
    along = letters.index("S")

    def at(row):
        return (row, *(0,) * (along - 1), places_BT[row, 0], *(0,) * (new.ndim - along - 1))

    if held.ndim < new.ndim:
        return jax.lax.dynamic_update_slice(held, new[0], at(0)[1:])
    if T == 1 and B <= FEW:  # in place: a scatter makes XLA:CPU copy the cache
        for row in range(B):
            held = jax.lax.dynamic_update_slice(held, new[row : row + 1], at(row))
        return held
    index = (jnp.arange(B)[:, None], *(slice(None),) * (along - 1), places_BT)
    return held.at[index].set(jnp.moveaxis(new, along, 1), mode="drop")
