"""Which keys a query sees."""

import jax
import jax.numpy as jnp

from llama_jax.model.context import OneSegment, Segments

# Score of a hidden key: exp underflows to exactly 0. Not -inf, which makes NaN of a row that sees nothing.
HIDDEN = -1e30


def causal(
    start: int, stop: int, segments: OneSegment | Segments, low: int = 0, window: int = 0
) -> jax.Array:
    """Queries start..stop against keys low..stop: not after the query, of its own segment, and in its window.

    A window of w: the query's own key and the w - 1 before it (arXiv:2004.05150 section 3.1); 0: no
    limit. Boolean [B or 1, stop - start, stop - low].
    """
    query, key = jnp.arange(start, stop)[:, None], jnp.arange(low, stop)[None, :]
    visible = (query >= key)[None]
    if window:
        visible &= (query - key < window)[None]
    if isinstance(segments, OneSegment):
        return visible
    own_BT = segments.segments_BT
    return visible & (own_BT[:, start:stop, None] == own_BT[:, None, low:stop])
