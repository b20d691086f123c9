"""Causal grouped-query attention, in ways that differ in speed and memory, never in numbers.

Every kernel maps q_BNTH, k_BKSH, v_BKSH, segments_BT (0 is padding; a query sees only keys of its own
segment; None: one segment) and the layout to [B, N, T, H]; S = T. Scores and softmax are float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model import mask
from llama_jax.sharding import Layout

BLOCK = 128  # queries at a time; see LOG.md for the sweep
SPLASH_BLOCK = 512  # of queries and of keys, at most
LANES = 128  # of a TPU's vector unit: splash's blocks are multiples of it


def reference(q_BNTH, k_BKSH, v_BKSH, segments_BT, layout: Layout):
    """softmax(q k / sqrt(H)) v over the whole square (arXiv:1706.03762 eq. 1, arXiv:2305.13245)."""
    visible_BTS = mask.causal(0, q_BNTH.shape[2], segments_BT)
    out_BNTH = attend(*layout.heads(q_BNTH, k_BKSH, v_BKSH), visible_BTS)
    return checkpoint_name(out_BNTH, "attended")


def attend(q_BNTH, k_BKSH, v_BKSH, visible_BTS):
    """Attention where `visible_BTS` says which keys a query sees."""
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = (q_BNTH * H**-0.5).reshape(B, K, N // K, T, H)
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BKGTS = score("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, mask.HIDDEN)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    return out_BKGTH.reshape(B, N, T, H)


def blockwise(q_BNTH, k_BKSH, v_BKSH, segments_BT, layout: Layout):
    """One block of queries at a time, against the keys up to its end: half the square is skipped.

    Never stores T x S scores (arXiv:2112.05682); the backward pass computes each block's again
    (arXiv:2205.14135 section 3.1). The heads of a group are rows of one matrix, X = G x (T of a block).
    """
    q_BNTH, k_BKSH, v_BKSH = layout.heads(q_BNTH, k_BKSH, v_BKSH)
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = (q_BNTH * H**-0.5).reshape(B, K, N // K, T, H)
    return _blocks(q_BKGTH, k_BKSH, v_BKSH, segments_BT).reshape(B, N, T, H)


@jax.custom_vjp
def _blocks(q_BKGTH, k_BKSH, v_BKSH, segments_BT):
    blocks = []
    G = q_BKGTH.shape[2]
    for rows, visible_BXS in _causal_blocks(G, k_BKSH, segments_BT):
        weights_BKXS = _weights(_block(q_BKGTH, rows), k_BKSH[:, :, : rows.stop], visible_BXS)
        weights_BKXS = weights_BKXS.astype(v_BKSH.dtype)
        out_BKXH = jnp.einsum("BKXS,BKSH->BKXH", weights_BKXS, v_BKSH[:, :, : rows.stop])
        blocks.append(_unblock(out_BKXH, G))
    return jnp.concatenate(blocks, axis=3)


def _blocks_forward(q_BKGTH, k_BKSH, v_BKSH, segments_BT):
    out_BKGTH = checkpoint_name(_blocks(q_BKGTH, k_BKSH, v_BKSH, segments_BT), "attended")
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH)


def _blocks_backward(saved, slope_BKGTH):
    """With p the weights and dp = slope v: d scores = p (dp - sum_S p dp), and that sum is slope . out."""
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH = saved
    G = q_BKGTH.shape[2]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    sums_BKGT1 = product("BKGTH,BKGTH->BKGT", slope_BKGTH, out_BKGTH)[..., None]
    q_slopes, k_slope, v_slope = [], 0.0, 0.0
    for rows, visible_BXS in _causal_blocks(G, k_BKSH, segments_BT):
        q, slope, sums = (_block(x, rows) for x in (q_BKGTH, slope_BKGTH, sums_BKGT1))
        k, v = k_BKSH[:, :, : rows.stop], v_BKSH[:, :, : rows.stop]
        weights_BKXS = _weights(q, k, visible_BXS)
        scores_slope_BKXS = weights_BKXS * (product("BKXH,BKSH->BKXS", slope, v) - sums)
        scores_slope_BKXS = scores_slope_BKXS.astype(q.dtype)
        q_slopes.append(_unblock(jnp.einsum("BKXS,BKSH->BKXH", scores_slope_BKXS, k), G))
        padding = ((0, 0), (0, 0), (0, k_BKSH.shape[2] - rows.stop), (0, 0))
        k_slope += jnp.pad(product("BKXS,BKXH->BKSH", scores_slope_BKXS, q), padding)
        v_slope += jnp.pad(product("BKXS,BKXH->BKSH", weights_BKXS.astype(v.dtype), slope), padding)
    q_slope = jnp.concatenate(q_slopes, axis=3)
    return q_slope, k_slope.astype(k_BKSH.dtype), v_slope.astype(v_BKSH.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _causal_blocks(G, k_BKSH, segments_BT):
    """(rows of T, which of the keys up to their end each of the G x T rows sees) of each block of queries."""
    length = k_BKSH.shape[2]
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        visible_BTS = mask.causal(start, stop, segments_BT)
        yield slice(start, stop), jnp.tile(visible_BTS, (1, G, 1))


def _block(x_BKGTH, rows):
    B, K, _, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, rows].reshape(B, K, -1, H)


def _unblock(x_BKXH, G):
    B, K, X, H = x_BKXH.shape
    return x_BKXH.reshape(B, K, G, X // G, H)


def _weights(q_BKXH, k_BKSH, visible_BXS):
    """float32 softmax of the scores of scaled queries."""
    scores_BKXS = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKXS = jnp.where(visible_BXS[:, None], scores_BKXS, mask.HIDDEN)
    return jax.nn.softmax(scores_BKXS, axis=-1)


def splash(q_BNTH, k_BKSH, v_BKSH, segments_BT, layout: Layout):
    """JAX's Pallas kernel for TPU v4 and later; each device attends with its own heads and rows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = q_BNTH.shape[2]
    if T % LANES:
        raise ValueError(
            f"model.kernel='splash' needs data.seq_len={T} to be a multiple of {LANES}; "
            f"nearest: {max(round(T / LANES), 1) * LANES}, or set model.kernel to 'blockwise'"
        )
    block = math.gcd(T, SPLASH_BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = library.BlockSizes(**{f"block_{name}": block for name in names})

    def local(q_BNTH, k_BKSH, v_BKSH, segments_BT):
        heads = masks.MultiHeadMask([masks.CausalMask((T, T))] * q_BNTH.shape[1])
        kernel = library.make_splash_mha(
            heads, block_sizes=sizes, head_shards=1, q_seq_shards=1,
            residual_checkpoint_name="attended",
        )  # fmt: skip
        own = None if segments_BT is None else library.SegmentIds(segments_BT, segments_BT)
        return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, own)

    scaled_BNTH = q_BNTH * q_BNTH.shape[-1] ** -0.5
    return layout.on_own_heads(local, scaled_BNTH, k_BKSH, v_BKSH, segments_BT)


def cudnn(q_BNTH, k_BKSH, v_BKSH, segments_BT, layout: Layout):
    """NVIDIA's fused kernel (arXiv:2307.08691), for 16-bit types on GPUs; each device its own heads."""

    def local(q_BNTH, k_BKSH, v_BKSH, segments_BT):
        q, k, v = (jnp.einsum("BNTH->BTNH", x) for x in (q_BNTH, k_BKSH, v_BKSH))
        visible = None
        if segments_BT is not None:
            visible = mask.causal(0, q.shape[1], segments_BT)[:, None]
        out_BTNH = jax.nn.dot_product_attention(
            q, k, v, mask=visible, is_causal=True, implementation="cudnn"
        )
        return checkpoint_name(jnp.einsum("BTNH->BNTH", out_BTNH), "attended")

    return layout.on_own_heads(local, q_BNTH, k_BKSH, v_BKSH, segments_BT)


KERNELS = {"reference": reference, "blockwise": blockwise, "splash": splash, "cudnn": cudnn}
