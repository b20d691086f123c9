"""Causal grouped-query attention, in ways that differ in speed and memory, never in numbers.

Every kernel maps q_BTNH, k_BSKH, v_BSKH and segments_BT (0 is padding; a query sees only keys of its own
segment; None: one segment) to [B, T, N, H]; S = T. Scores and softmax are float32.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.model import mask

BLOCK = 128  # queries at a time; see LOG.md for the sweep


def reference(q_BTNH, k_BSKH, v_BSKH, segments_BT=None):
    """softmax(q k / sqrt(H)) v over the whole square (arXiv:1706.03762 eq. 1, arXiv:2305.13245)."""
    return attend(q_BTNH, k_BSKH, v_BSKH, mask.causal(0, q_BTNH.shape[1], segments_BT))


def blockwise(q_BTNH, k_BSKH, v_BSKH, segments_BT=None):
    """One block of queries at a time, against the keys up to its end.

    Never stores T x S scores (arXiv:2112.05682) and skips the blocks above the diagonal. The backward
    pass computes each block's scores again.
    """
    attend_block = jax.checkpoint(attend, prevent_cse=False)
    length = q_BTNH.shape[1]
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        visible = mask.causal(start, stop, segments_BT)
        blocks.append(
            attend_block(q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], visible)
        )
    return jnp.concatenate(blocks, axis=1)


def attend(q_BTNH, k_BSKH, v_BSKH, visible_BTS):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BKGTS = score("BTKGH,BSKH->BKGTS", q_BTKGH * H**-0.5, k_BSKH)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, mask.HIDDEN)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


KERNELS = {"reference": reference, "blockwise": blockwise}
