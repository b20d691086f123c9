"""What the layers of one forward pass read besides x: one value, the same for every layer.

What a layer is to do is the type of a field: each choice has a name and holds what it needs.
"""

from typing import NamedTuple

import jax

from llama_jax.model.position import Where


class OneSegment(NamedTuple):
    """Self-attention among the tokens of this call; each sequence is one segment."""


class Segments(NamedTuple):
    """Self-attention among the tokens of this call, each within its own segment (packed documents)."""

    segments_BT: jax.Array  # int32, from 1; 0 is padding


class Cached(NamedTuple):
    """Self-attention to the keys and values in the cache (cache.py), which the tokens of this call extend."""

    real_BT: jax.Array  # bool; the others are padding: not kept, and their outputs mean nothing


class NoMemory(NamedTuple):
    """There is no memory: blocks of cross-attention return x as it is."""


class Memory(NamedTuple):
    """M states of each sequence for cross-attention, such as projected image tokens.

    With `Cached` keys a block keeps the keys and values that it computes of them in its cache.
    """

    x_BMD: jax.Array
    visible_BTM: jax.Array  # bool; which of them each token sees, in every block


class CachedMemory(NamedTuple):
    """The memory of an earlier call, whose keys and values are in the caches of the blocks."""

    visible_BTM: jax.Array


Keys = OneSegment | Segments | Cached
Memories = NoMemory | Memory | CachedMemory


class Context(NamedTuple):
    """What every layer is given beside x_BTD. A kind of block reads the fields that it needs."""

    positions_BT: jax.Array  # int32, of the tokens of this call, within their segments
    where: Where  # what the position scheme makes of them
    keys: Keys  # which keys the queries of self-attention see
    memory: Memories  # what cross-attention reads
