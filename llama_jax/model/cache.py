"""Keys and values of the sequence so far, so that a new token costs the work of one position.

A cache is the collection "cache" of a network's variables. What a kind of block caches is in block.BLOCKS, as
letters; `empty` makes the cache of any pattern. Self-attention keeps keys and values in S slots for each of B
sequences. The token at position p of a sequence is kept in slot p mod S: as long as a sequence has at most S
tokens they are all there, after that the oldest gives way. A sequence is extended at its end, or from any
earlier position on, whose later tokens are then forgotten.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax import dims
from llama_jax.model import kernels
from llama_jax.model.context import Cached, Context
from llama_jax.model.kernels import ScoreRule

CACHE = "cache"
FEW = 16  # sequences that are written one by one
# What self-attention caches: keys as the product with queries reads them, else XLA:CPU transposes them at
# each token.
KEYS_AND_VALUES = {"k": "BKHS", "v": "BKSH"}
SCALE = "_scale"  # ends the name of what int8 keys or values are multiplied by


def empty(module: Any, dtype: str, **sizes: int) -> dict[str, Any]:
    """The cache of a network (`unstacked`) before the first token: `empty(module, "bfloat16", B=3, S=128)`.

    sizes: of the letters that no setting of the model fixes. dtype: of keys and values; "int8" ones have a
    float32 scale for each of a head. ValueError if a size is missing that some block of the pattern needs.
    """
    shapes = abstract(module, dtype, **sizes)
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
    return jax.jit(zeros, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()


def abstract(module: Any, dtype: str, **sizes: int) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a cache; no memory."""
    model, layout = module.config, module.layout
    layout.check_rows(sizes["B"])
    size = {**dims.sizes(model), "K": layout.key_heads(model.kv_heads), **sizes}

    def array(letters: str, dtype) -> jax.ShapeDtypeStruct:
        if missing := [letter for letter in letters if letter not in size]:
            words = ", ".join(f"{letter} ({dims.LETTERS[letter].words})" for letter in missing)
            raise ValueError(
                f"the cache of model.pattern={model.pattern} needs a size of {words}; given: {sizes}"
            )
        shape = [size[letter] for letter in letters]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.cache(letters))

    def arrays(caches: dict[str, str]) -> dict[str, jax.ShapeDtypeStruct]:
        made = {name: array(letters, jnp.dtype(dtype)) for name, letters in caches.items()}
        if dtype == "int8":
            scales = {name + SCALE: _of_scale(letters) for name, letters in caches.items()}
            made |= {name: array(letters, jnp.float32) for name, letters in scales.items()}
        return made

    group = {
        block: {part: arrays(caches) for part, caches in parts.items()}
        for block, parts in module.caches.items()
    }
    return {f"group_{i}": group for i in range(model.groups)}


def placed(module: Any, held: Any) -> Any:
    """A cache, constrained inside jit to where `empty` puts it."""

    def constrain(path, array):
        place = module.layout.cache(_letters(module, path))
        return jax.lax.with_sharding_constraint(array, place)

    return jax.tree.map_with_path(constrain, held)


def slots(module: Any, held: Any) -> int:
    """S of a cache, with B or without."""
    for path, array in jax.tree.leaves_with_path(held):
        letters = _letters(module, path)
        if "S" in letters:
            return array.shape[letters.index("S") - len(letters)]
    raise ValueError(f"no block of model.pattern={module.config.pattern} caches past positions")


def without_rows(held: Any) -> Any:
    """The cache of one sequence without B, for calls of one token: with B, XLA:CPU copies half of it."""
    return jax.tree.map(lambda array: array[0], held)


def with_rows(held: Any) -> Any:
    """The inverse."""
    return jax.tree.map(lambda array: array[None], held)


def _letters(module, path) -> str:
    """Of the array at .../self_0/attention/k_scale."""
    block, part, name = (key.key for key in path[-3:])
    letters = module.caches[block][part][name.removesuffix(SCALE)]
    return _of_scale(letters) if name.endswith(SCALE) else letters


def _of_scale(letters: str) -> str:
    return letters.replace("H", "")


def attend(
    module: Any,
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    context: Context,
    scores: ScoreRule,
) -> jax.Array:
    """Keep new keys and values, and attend to all that are kept: [B, N, T, H].

    Padding (`Cached`) is not kept, and what comes out for it means nothing. The positions of the other tokens
    rise by one.
    """
    own_heads = module.layout.heads(q_BNTH, k_BKTH, v_BKTH)
    return _attend(module, *own_heads, context=context, scores=scores)


def _attend(module, q_BNTH, k_BKTH, v_BKTH, context: Context, scores: ScoreRule) -> jax.Array:
    assert isinstance(context.keys, Cached)
    positions_BT, real_BT = context.positions_BT, context.keys.real_BT
    *_, S = module.get_variable(CACHE, "k").shape
    slots_BT = jnp.where(real_BT, positions_BT % S, S)  # beyond the last slot nothing is written

    def extend(held, new, letters):
        return _extended(held, new, letters, slots_BT)

    k_BKHT = jnp.einsum("BKTH->BKHT", k_BKTH)
    k_BKHS = keep(module, "k", KEYS_AND_VALUES["k"], k_BKHT, extend)
    v_BKSH = keep(module, "v", KEYS_AND_VALUES["v"], v_BKTH, extend)
    k_BKSH = jnp.einsum("BKHS->BKSH", k_BKHS)
    last_B1 = jnp.max(jnp.where(real_BT, positions_BT, -1), axis=1, keepdims=True)
    kept_BS = last_B1 - (last_B1 - jnp.arange(S)) % S  # the position whose token each slot holds
    back_BTS = positions_BT[:, :, None] - kept_BS[:, None, :]
    visible_BTS = (kept_BS[:, None, :] >= 0) & (back_BTS >= 0)
    if scores.window:
        visible_BTS &= back_BTS < scores.window
    bias_BNTS = None
    if scores.bias_NS is not None:
        bias_BNTS = jnp.moveaxis(scores.bias_NS[:, jnp.clip(back_BTS, 0, S - 1)], 0, 1)
    return kernels.attend(q_BNTH, k_BKSH, v_BKSH, visible_BTS, scores.softcap, bias_BNTS)


def keep(module: Any, name: str, letters: str, new: jax.Array, write: Callable) -> jax.Array:
    """Write keys or values of a layer into its cache, and return all that it holds, in the dtype of `new`.

    letters: of the cached array, such as "BKHS". write(held, new, letters) -> held, of the array and of the
    scales of int8; `held` is without B where the cache is.
    """
    parts = {name: new}
    if module.get_variable(CACHE, name).dtype == jnp.int8:
        of_head = letters.index("H")
        scale = jnp.max(jnp.abs(new.astype(jnp.float32)), axis=of_head) / 127
        integers = jnp.round(new / jnp.expand_dims(jnp.maximum(scale, 1e-30), of_head))
        parts = {name: integers, name + SCALE: scale}
    for part, array in parts.items():
        held = module.get_variable(CACHE, part)
        of_part = letters if part == name else _of_scale(letters)
        module.put_variable(CACHE, part, write(held, array.astype(held.dtype), of_part))
    return kept(module, name, letters, new.dtype)


def kept(module: Any, name: str, letters: str, dtype: DTypeLike) -> jax.Array:
    """The keys or values in a layer's cache, with B."""

    def array(name: str, letters: str) -> jax.Array:
        held = module.get_variable(CACHE, name)
        return held if held.ndim == len(letters) else held[None]

    held = array(name, letters)
    if held.dtype != jnp.int8:
        return held.astype(dtype)
    scale = array(name + SCALE, _of_scale(letters))
    return (held * jnp.expand_dims(scale, letters.index("H"))).astype(dtype)


def _extended(held, new, letters, slots_BT):
    """`held`, with B or of one sequence without, extended by `new`, which has T in the place of S.

    Padding, the token of an idle row, goes nowhere where several are written at once; else to the last
    slot, which decode/engine.py leaves free.
    """
    B, T = slots_BT.shape
    along = letters.index("S")

    def at(row):
        return (row, *(0,) * (along - 1), slots_BT[row, 0], *(0,) * (new.ndim - along - 1))

    if held.ndim < new.ndim:
        return jax.lax.dynamic_update_slice(held, new[0], at(0)[1:])
    if T == 1 and B <= FEW:  # in place: a scatter makes XLA:CPU copy the cache
        for row in range(B):
            held = jax.lax.dynamic_update_slice(held, new[row : row + 1], at(row))
        return held
    index = (jnp.arange(B)[:, None], *(slice(None),) * (along - 1), slots_BT)
    return held.at[index].set(jnp.moveaxis(new, along, 1), mode="drop")
