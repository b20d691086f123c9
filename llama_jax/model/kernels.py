"""Causal grouped-query attention, in ways that differ in speed and memory, never in numbers.

Every kernel maps q_BNTH, k_BKSH, v_BKSH, the segments (`OneSegment` or `Segments`: a query sees only keys of
its own), the layout and the scores' rule to [B, N, T, H]; S = T. Scores and softmax are float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax import config
from llama_jax.model import mask
from llama_jax.model.context import OneSegment, Segments
from llama_jax.model.position import BIASED
from llama_jax.sharding import Layout

BLOCK = 128  # queries at a time; see LOG.md for the sweep
# Of more positions than these a block waits for the one before it. Where nothing holds it TPU's compiler
# works on all blocks at once and stores half the square: 5 GiB a layer of Llama 3.2 1B at 8,192 instead of
# 1.5. Waiting costs a tenth to a fifth of the cycles.
IN_ORDER_FROM = 2048
SPLASH_BLOCK = 512  # of queries and of keys, at most
LANES = 128  # of a TPU's vector unit: splash's blocks are multiples of it


class ScoreRule(NamedTuple):
    """How q k / sqrt(H) becomes what softmax sees: capped, with a bias, hidden where out of sight."""

    window: int = 0  # a query sees so many keys, its own among them; 0: all before it
    softcap: float = 0.0  # cap x tanh(score / cap) (arXiv:2408.00118 section 2); 0: none
    bias_NS: jax.Array | None = None  # float32, to the score of the key S positions back


USUAL = ScoreRule()
Segmented = OneSegment | Segments


def reference(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: Segmented,
    layout: Layout,
    scores: ScoreRule = USUAL,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the whole square (arXiv:1706.03762 eq. 1, arXiv:2305.13245)."""
    visible_BTS = mask.causal(0, q_BNTH.shape[2], segments, window=scores.window)
    own_heads = layout.heads(q_BNTH, k_BKSH, v_BKSH)
    bias_NTS, whole = None, slice(0, q_BNTH.shape[2])
    if scores.bias_NS is not None:
        bias_NTS = _by_distance(scores.bias_NS, whole, whole)
    out_BNTH = attend(*own_heads, visible_BTS=visible_BTS, softcap=scores.softcap, bias=bias_NTS)
    return checkpoint_name(out_BNTH, "attended")


def attend(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visible_BTS: jax.Array,
    softcap: float = 0.0,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention where `visible_BTS` says which keys a query sees. bias: [B, N, T, S], or without B."""
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = (q_BNTH * H**-0.5).reshape(B, K, N // K, T, H)
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BKGTS = _capped(score("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH), softcap)
    if bias is not None:
        scores_BKGTS += bias.reshape(-1, K, N // K, T, k_BKSH.shape[2])
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, mask.HIDDEN)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    return out_BKGTH.reshape(B, N, T, H)


def _capped(scores, softcap: float):
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def _by_distance(bias_NS, rows: slice, keys: slice):
    """The bias of each query of `rows` to each key of `keys`, [N, rows, keys]; after the query any number.

    Row i is row 0 moved by i. Repeated end to end and cut into rows one shorter, an array moves by one a
    row: no gather, and no scatter in the gradient, both slow on a TPU.
    """
    N, T, S = bias_NS.shape[0], rows.stop - rows.start, keys.stop - keys.start
    nearest_first = bias_NS[:, : rows.stop - keys.start]  # biases of the last query
    # From the farthest key of the last query to keys after the first one.
    line_NX = jnp.pad(nearest_first[:, ::-1], ((0, 0), (0, T + S - nearest_first.shape[1])))
    line_NX = jnp.roll(line_NX, -(T - 1), axis=1)
    moved = jnp.tile(line_NX, (1, T))[:, : T * (T + S - 1)]
    return moved.reshape(N, T, T + S - 1)[:, :, :S]


def blockwise(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: Segmented,
    layout: Layout,
    scores: ScoreRule = USUAL,
) -> jax.Array:
    """One block of queries at a time, against the keys up to its end: half the square is skipped.

    Never stores T x S scores (arXiv:2112.05682); the backward pass computes each block's again
    (arXiv:2205.14135 section 3.1). The heads of a group are rows of one matrix, X = G x (T of a block).
    """
    own_heads = layout.heads(q_BNTH, k_BKSH, v_BKSH)
    return _blockwise(*own_heads, segments=segments, scores=scores)


def _blockwise(q_BNTH, k_BKSH, v_BKSH, segments, scores: ScoreRule) -> jax.Array:
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = (q_BNTH * H**-0.5).reshape(B, K, N // K, T, H)
    out: Any = _blocks(q_BKGTH, k_BKSH, v_BKSH, segments, *reversed(scores))
    return out.reshape(B, N, T, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocks(q_BKGTH, k_BKSH, v_BKSH, segments, bias_NS, softcap, window) -> jax.Array:
    blocks = []
    G, length = q_BKGTH.shape[2], k_BKSH.shape[2]
    # Names without letters are of one block, whose S is a part of the whole.
    for rows, keys, visible in _causal_blocks(G, length, segments, window):
        bias = _block_bias(bias_NS, rows, keys, G)
        weights, _ = _weights(_block(q_BKGTH, rows), k_BKSH[:, :, keys], visible, bias, softcap)
        weights = weights.astype(v_BKSH.dtype)
        out_BKXH = jnp.einsum("BKXS,BKSH->BKXH", weights, v_BKSH[:, :, keys])
        out_BKXH, q_BKGTH = _in_order(out_BKXH, q_BKGTH)
        blocks.append(_unblock(out_BKXH, G))
    return jnp.concatenate(blocks, axis=3)


def _blocks_forward(q_BKGTH, k_BKSH, v_BKSH, segments, bias_NS, softcap, window):
    out_BKGTH = _blocks(q_BKGTH, k_BKSH, v_BKSH, segments, bias_NS, softcap, window)
    out_BKGTH = checkpoint_name(out_BKGTH, "attended")
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segments, bias_NS, out_BKGTH)


def _blocks_backward(softcap, window, saved, slope_BKGTH):
    """With p the weights and dp = slope v: d scores = p (dp - sum_S p dp), and that sum is slope . out."""
    q_BKGTH, k_BKSH, v_BKSH, segments, bias_NS, out_BKGTH = saved
    G, length = q_BKGTH.shape[2], k_BKSH.shape[2]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    sums_BKGT1 = product("BKGTH,BKGTH->BKGT", slope_BKGTH, out_BKGTH)[..., None]
    q_slopes, k_slope, v_slope = [], _ZERO, _ZERO
    bias_slope = None if bias_NS is None else 0.0
    for rows, keys, visible in _causal_blocks(G, length, segments, window):
        q, slope, sums = (_block(x, rows) for x in (q_BKGTH, slope_BKGTH, sums_BKGT1))
        k, v = k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        of_bias = functools.partial(_block_bias, rows=rows, keys=keys, G=G)
        weights, capped = _weights(q, k, visible, of_bias(bias_NS), softcap)
        scores_slope = weights * (product("BKXH,BKSH->BKXS", slope, v) - sums)
        if bias_NS is not None:
            (more,) = jax.vjp(of_bias, bias_NS)[1](jnp.sum(scores_slope, axis=0))
            bias_slope += more
        if softcap:  # d cap tanh(x / cap) / d x = 1 - tanh^2
            scores_slope *= 1 - jnp.square(capped / softcap)
        scores_slope = scores_slope.astype(q.dtype)
        q_slopes.append(_unblock(jnp.einsum("BKXS,BKSH->BKXH", scores_slope, k), G))
        padding = ((0, 0), (0, 0), (keys.start, length - keys.stop), (0, 0))
        k_slope += jnp.pad(product("BKXS,BKXH->BKSH", scores_slope, q), padding)
        v_slope += jnp.pad(product("BKXS,BKXH->BKSH", weights.astype(v.dtype), slope), padding)
        (k_slope, v_slope), slope_BKGTH = _in_order((k_slope, v_slope), slope_BKGTH)
    q_slope = jnp.concatenate(q_slopes, axis=3)
    return q_slope, k_slope.astype(k_BKSH.dtype), v_slope.astype(v_BKSH.dtype), None, bias_slope


_blocks.defvjp(_blocks_forward, _blocks_backward)


_ZERO: Any = 0.0  # what arrays are added to


def _in_order(done, inputs_BKGTH):
    """The same two, the second of which cannot be read before the first is there."""
    if inputs_BKGTH.shape[3] <= IN_ORDER_FROM:
        return done, inputs_BKGTH
    return jax.lax.optimization_barrier((done, inputs_BKGTH))


def _causal_blocks(G, length, segments, window):
    """(rows of T, their keys, which of those each of the G x T rows sees) of each block of queries."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low = max(0, start - window + 1) // BLOCK * BLOCK if window else 0
        visible_BTS = mask.causal(start, stop, segments, low, window)
        yield slice(start, stop), slice(low, stop), jnp.tile(visible_BTS, (1, G, 1))


def _block(x_BKGTH, rows):
    B, K, _, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, rows].reshape(B, K, -1, H)


def _unblock(x_BKXH, G):
    B, K, X, H = x_BKXH.shape
    return x_BKXH.reshape(B, K, G, X // G, H)


def _block_bias(bias_NS, rows, keys, G):
    if bias_NS is None:
        return None
    bias = _by_distance(bias_NS, rows, keys)
    return bias.reshape(-1, G * bias.shape[1], bias.shape[2])


def _weights(q_BKXH, k_BKSH, visible_BXS, bias_KXS, softcap):
    """float32 softmax of the scores of scaled queries, and those as the cap left them."""
    scores_BKXS = jnp.einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, preferred_element_type=jnp.float32)
    capped_BKXS = scores_BKXS = _capped(scores_BKXS, softcap)
    if bias_KXS is not None:
        scores_BKXS += bias_KXS
    scores_BKXS = jnp.where(visible_BXS[:, None], scores_BKXS, mask.HIDDEN)
    return jax.nn.softmax(scores_BKXS, axis=-1), capped_BKXS


def splash(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: Segmented,
    layout: Layout,
    scores: ScoreRule = USUAL,
) -> jax.Array:
    """JAX's Pallas kernel for TPU v4 and later; each device attends with its own heads and rows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = q_BNTH.shape[2]
    check_length("splash", T)
    block = math.gcd(T, SPLASH_BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    sizes = library.BlockSizes(**blocks)

    def local(q_BNTH, k_BKSH, v_BKSH, segments) -> Any:
        heads = masks.MultiHeadMask([masks.CausalMask((T, T))] * q_BNTH.shape[1])
        kernel = library.make_splash_mha(
            heads, block_sizes=sizes, head_shards=1, q_seq_shards=1,
            residual_checkpoint_name="attended",
            attn_logits_soft_cap=scores.softcap or None,
        )  # fmt: skip
        own = None
        if isinstance(segments, Segments):
            own = library.SegmentIds(segments.segments_BT, segments.segments_BT)
        return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, own)

    scaled_BNTH = q_BNTH * q_BNTH.shape[-1] ** -0.5
    return layout.on_own_heads(local, scaled_BNTH, k_BKSH, v_BKSH, segments)


def cudnn(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: Segmented,
    layout: Layout,
    scores: ScoreRule = USUAL,
) -> jax.Array:
    """NVIDIA's fused kernel (arXiv:2307.08691), for 16-bit types on GPUs; each device its own heads."""

    def local(q_BNTH, k_BKSH, v_BKSH, segments):
        q, k, v = (jnp.einsum("BNTH->BTNH", x) for x in (q_BNTH, k_BKSH, v_BKSH))
        visible = None
        if isinstance(segments, Segments):
            visible = mask.causal(0, q.shape[1], segments)[:, None]
        out_BTNH = jax.nn.dot_product_attention(
            q, k, v, mask=visible, is_causal=True, implementation="cudnn"
        )
        return checkpoint_name(jnp.einsum("BTNH->BNTH", out_BTNH), "attended")

    return layout.on_own_heads(local, q_BNTH, k_BKSH, v_BKSH, segments)


def check_length(kernel: str, length: int) -> None:
    """ValueError if the kernel cannot take rows of so many positions."""
    if kernel == "splash" and length % LANES:
        raise ValueError(
            f"model.kernel='splash' needs data.seq_len={length} to be a multiple of {LANES}; "
            f"nearest: {max(round(length / LANES), 1) * LANES}, or set model.kernel to 'blockwise'"
        )


def unable(model: config.Model, kernel: str) -> str:
    """What of the model's attention the kernel does not do; "" if it does all."""
    asked = {
        f"model.position={model.position!r}": model.position in BIASED,
        f"model.window={model.window}": model.window > 0,
        f"model.softcap={model.softcap}": model.softcap > 0 and kernel != "splash",
    }
    if kernel in ("reference", "blockwise"):
        return ""
    return next((what for what, is_asked in asked.items() if is_asked), "")


KERNELS = {"reference": reference, "blockwise": blockwise, "splash": splash, "cudnn": cudnn}
