"""Which keys a query sees."""

import jax.numpy as jnp

# Score of a hidden key: exp underflows to exactly 0. Not -inf, which makes NaN of a row that sees nothing.
HIDDEN = -1e30


def causal(start: int, stop: int, segments_BT=None):
    """Queries start..stop against keys 0..stop: not after the query, and of its own segment.

    Boolean [B or 1, stop - start, stop].
    """
    visible = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :])[None]
    if segments_BT is None:
        return visible
    return visible & (segments_BT[:, start:stop, None] == segments_BT[:, None, :stop])
