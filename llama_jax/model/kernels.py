"""Causal grouped-query attention, in ways that differ in speed and memory, never in numbers.

Every kernel maps q_BTNH, k_BSKH, v_BSKH and segments_BT (0 is padding; a query sees only keys of its own
segment; None: one segment) to [B, T, N, H]; S = T. Scores and softmax are float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model import mask

BLOCK = 128  # queries at a time; see LOG.md for the sweep


def reference(q_BTNH, k_BSKH, v_BSKH, segments_BT=None):
    """softmax(q k / sqrt(H)) v over the whole square (arXiv:1706.03762 eq. 1, arXiv:2305.13245)."""
    out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask.causal(0, q_BTNH.shape[1], segments_BT))
    return checkpoint_name(out_BTNH, "attended")


def attend(q_BTNH, k_BSKH, v_BSKH, visible_BTS):
    """Attention where `visible_BTS` says which keys a query sees."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BKGTS = score("BTKGH,BSKH->BKGTS", q_BTKGH * H**-0.5, k_BSKH)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, mask.HIDDEN)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


def blockwise(q_BTNH, k_BSKH, v_BSKH, segments_BT=None):
    """One block of queries at a time, against the keys up to its end: half the square is skipped.

    Never stores T x S scores (arXiv:2112.05682); the backward pass computes each block's again
    (arXiv:2205.14135 section 3.1). The heads of a group are rows of one matrix, X = T x G.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
    q_BKXH = q_BTKGH.transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    out_BKXH = _blocks(q_BKXH, k_BKSH, v_BKSH, segments_BT)
    out_BKTGH = out_BKXH.reshape(B, K, T, N // K, H)
    return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _blocks(q_BKXH, k_BKSH, v_BKSH, segments_BT):
    blocks = []
    for rows, stop, visible_BXS in _causal_blocks(q_BKXH, k_BKSH, segments_BT):
        weights_BKXS = _weights(q_BKXH[:, :, rows], k_BKSH[:, :, :stop], visible_BXS)
        weights_BKXS = weights_BKXS.astype(v_BKSH.dtype)
        blocks.append(jnp.einsum("BKXS,BKSH->BKXH", weights_BKXS, v_BKSH[:, :, :stop]))
    return jnp.concatenate(blocks, axis=2)


def _blocks_forward(q_BKXH, k_BKSH, v_BKSH, segments_BT):
    out_BKXH = checkpoint_name(_blocks(q_BKXH, k_BKSH, v_BKSH, segments_BT), "attended")
    return out_BKXH, (q_BKXH, k_BKSH, v_BKSH, segments_BT, out_BKXH)


def _blocks_backward(saved, slope_BKXH):
    """With p the weights and dp = slope v: d scores = p (dp - sum_S p dp), and that sum is slope . out."""
    q_BKXH, k_BKSH, v_BKSH, segments_BT, out_BKXH = saved
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    sums_BKX1 = product("BKXH,BKXH->BKX", slope_BKXH, out_BKXH)[..., None]
    q_slopes, k_slope, v_slope = [], 0.0, 0.0
    for rows, stop, visible_BXS in _causal_blocks(q_BKXH, k_BKSH, segments_BT):
        q, slope, sums = q_BKXH[:, :, rows], slope_BKXH[:, :, rows], sums_BKX1[:, :, rows]
        k, v = k_BKSH[:, :, :stop], v_BKSH[:, :, :stop]
        weights_BKXS = _weights(q, k, visible_BXS)
        scores_slope_BKXS = weights_BKXS * (product("BKXH,BKSH->BKXS", slope, v) - sums)
        scores_slope_BKXS = scores_slope_BKXS.astype(q.dtype)
        q_slopes.append(jnp.einsum("BKXS,BKSH->BKXH", scores_slope_BKXS, k))
        padding = ((0, 0), (0, 0), (0, k_BKSH.shape[2] - stop), (0, 0))
        k_slope += jnp.pad(product("BKXS,BKXH->BKSH", scores_slope_BKXS, q), padding)
        v_slope += jnp.pad(product("BKXS,BKXH->BKSH", weights_BKXS.astype(v.dtype), slope), padding)
    q_slope = jnp.concatenate(q_slopes, axis=2)
    return q_slope, k_slope.astype(k_BKSH.dtype), v_slope.astype(v_BKSH.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _causal_blocks(q_BKXH, k_BKSH, segments_BT):
    """(rows of X, keys seen, which of them) of each block of queries."""
    length = k_BKSH.shape[2]
    group = q_BKXH.shape[2] // length
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        visible_BTS = mask.causal(start, stop, segments_BT)
        yield slice(start * group, stop * group), stop, jnp.repeat(visible_BTS, group, axis=1)


def _weights(q_BKXH, k_BKSH, visible_BXS):
    """float32 softmax of the scores of scaled queries."""
    scores_BKXS = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKXS = jnp.where(visible_BXS[:, None], scores_BKXS, mask.HIDDEN)
    return jax.nn.softmax(scores_BKXS, axis=-1)


KERNELS = {"reference": reference, "blockwise": blockwise}
