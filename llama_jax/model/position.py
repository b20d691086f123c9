"""Where a token stands: what a position scheme gives to the network.

A scheme is a function `(module, positions_BT, reach) -> Where`, called once a forward pass by the
transformer, whose parameters it may add to; keys are less than `reach` positions before their query. Rotary
embedding is half-split: entry i pairs with entry i + H/2. Meta's checkpoints interleave the pairs.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import config, dims
from llama_jax.model.init import dense_param, initial
from llama_jax.model.table import look_up


class Where(NamedTuple):
    """What a scheme gives to the network; None: it gives nothing of the kind."""

    added_BTD: jax.Array | None = None  # to the embedding
    turns: tuple[jax.Array, jax.Array] | None = None  # cosine and sine, for queries and keys
    bias_NS: jax.Array | None = None  # float32, to the score of the key S positions back


def frequencies(
    head_dim: int, rope: config.Rope, dtype: type[np.floating] = np.float64
) -> np.ndarray:
    """Radians a position for each of the H/2 pairs, [h] (arXiv:2104.09864 section 3.2.2).

    Those past rope.rotary_dim are 0 (GPT-NeoX, arXiv:2204.06745 section 2.1.1). Each step is rounded to
    `dtype`.
    """
    turning = rope.rotary_dim or head_dim
    exponents = np.arange(0, turning, 2).astype(dtype) / dtype(turning)
    inverse = 1 / (rope.theta ** exponents.astype(np.float64)).astype(dtype)
    inverse = SCALINGS[rope.scaling](inverse, rope).astype(dtype)
    return np.concatenate([inverse, np.zeros((head_dim - turning) // 2, dtype)])


def _linear(inverse, rope):
    """Positions as if they were closer together (arXiv:2306.15595 eq. 4)."""
    return inverse / rope.factor


def _ntk(inverse, rope):
    """The fastest pair stays, the slowest is stretched by the factor: theta x factor^(d / (d - 2)).

    As "NTK-aware" scaling is given in arXiv:2309.00071 eq. 16.
    """
    return inverse / rope.factor ** np.linspace(0, 1, len(inverse))


def _by_parts(inverse, rope):
    """Llama 3.1's (arXiv:2407.21783; the rule is in Meta's llama-models), YaRN's (arXiv:2309.00071 eq. 13).

    Wavelengths longer than original/low are stretched by the factor, those shorter than original/high
    are left alone, between them the two are blended.
    """
    turns = rope.original_length * inverse / (2 * math.pi)  # in the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(blend, 0, 1)
    return inverse * (keep + (1 - keep) / rope.factor)


SCALINGS = {"linear": _linear, "ntk": _ntk, "llama3": _by_parts, "yarn": _by_parts}


def rope_turns(model: config.Model, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, float32 [B, T, h].

    Frequencies are rounded to float32 at every step, as in Meta's code and Hugging Face's, with which
    the released weights were trained and are run. It costs up to 6 units in the last place: at position
    100,000 logits move by 0.1%, and rounding once at the end would move ours away from theirs. The product
    with the position is float32, too: at 131,071 the fastest angle is off by at most 0.004 radians.
    """
    inverse_h = jnp.asarray(frequencies(model.head_dim, model.rope, np.float32), jnp.float32)
    angles_BTh = positions_BT[..., None].astype(jnp.float32) * inverse_h
    cos_BTh, sin_BTh = jnp.cos(angles_BTh), jnp.sin(angles_BTh)
    if model.rope.scaling == "yarn":
        # Queries and keys both grow: scores by its square (arXiv:2309.00071 eq. 15).
        grow = 0.1 * math.log(model.rope.factor) + 1
        return cos_BTh * grow, sin_BTh * grow
    return cos_BTh, sin_BTh


def rope(module: nn.Module, positions_BT: jax.Array, reach: int) -> Where:
    """Rotary embedding (arXiv:2104.09864)."""
    return Where(turns=rope_turns(module.config, positions_BT))


def none(module: nn.Module, positions_BT: jax.Array, reach: int) -> Where:
    """No position at all; the causal mask alone tells order (NoPE, arXiv:2305.19466)."""
    return Where()


def learned(module: nn.Module, positions_BT: jax.Array, reach: int) -> Where:
    """A vector for each position, added to the embedding (GPT-2; arXiv:1706.03762 section 3.5)."""
    table_RD = dense_param(module, "positions", "RD", initial(module.config, "table"))
    dtype = module.config.compute_dtype
    return Where(added_BTD=look_up(table_RD, positions_BT, module.layout, "RD", dtype))


def sinusoidal(module: nn.Module, positions_BT: jax.Array, reach: int) -> Where:
    """Sines and cosines of D/2 frequencies, added to the embedding (arXiv:1706.03762 section 3.5).

    Scaled to the embedding's standard deviation: there the embedding is multiplied by sqrt(D), here it
    is as small as it is initialised.
    """
    model = module.config
    inverse_d = jnp.asarray(1e4 ** (-np.arange(0, model.dim, 2) / model.dim), jnp.float32)
    angles_BTd = positions_BT[..., None].astype(jnp.float32) * inverse_d
    pairs = jnp.stack([jnp.sin(angles_BTd), jnp.cos(angles_BTd)], axis=-1)
    waves_BTD = pairs.reshape(*positions_BT.shape, -1)[..., : model.dim]
    return Where(added_BTD=(waves_BTD * (model.init_std * 2**0.5)).astype(model.compute_dtype))


def alibi(module: nn.Module, positions_BT: jax.Array, reach: int) -> Where:
    """Scores fall linearly with distance, in each head at its own slope (arXiv:2108.12409 section 3)."""
    slopes_N = alibi_slopes(module.config.heads)
    distances_S = np.arange(reach)
    return Where(bias_NS=jnp.asarray(-np.outer(slopes_N, distances_S), jnp.float32))


def alibi_slopes(heads: int) -> np.ndarray:
    """2^(-8 i / n), i from 1, for n heads; of other numbers than powers of two those of the power below,
    then every second one of the power above (section 3, footnote 10 and the authors' code)."""
    power = 2 ** int(math.log2(heads))
    below = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    above = 2.0 ** (-8 * np.arange(1, 2 * power + 1) / (2 * power))
    return np.concatenate([below, above[::2][: heads - power]])


FAR = 128  # T5: from this distance on one bucket (arXiv:1910.10683 section 2.1)


def t5(module: nn.Module, positions_BT: jax.Array, reach: int) -> Where:
    """A learned number for each head and bucket of distances, the same in every layer.

    Half of the buckets are single distances, half grow logarithmically up to FAR.
    """
    table_NU = dense_param(module, "distances", "NU", initial(module.config, "table"))
    buckets_S = t5_buckets(reach)
    return Where(bias_NS=table_NU.astype(jnp.float32)[:, buckets_S])


def t5_buckets(distances: int) -> np.ndarray:
    """The bucket of each distance 0, 1, ..., [S]."""
    single = dims.DISTANCE_BUCKETS // 2
    distance_S = np.arange(distances)
    beyond = np.log(np.maximum(distance_S, single) / single) / math.log(FAR / single)
    large = single + (beyond * (dims.DISTANCE_BUCKETS - single)).astype(int)
    return np.where(distance_S < single, distance_S, np.minimum(large, dims.DISTANCE_BUCKETS - 1))


def rotate(x_BNTH: jax.Array, turns: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Rotate query or key pairs by position (RoPE, arXiv:2104.09864 eq. 34), in float32."""
    if turns is None:
        return x_BNTH
    cos_B1TH, sin_B1TH = (jnp.concatenate([t, t], axis=-1)[:, None] for t in turns)
    return _rotate(x_BNTH, cos_B1TH, sin_B1TH)


@jax.custom_vjp
def _rotate(x_BNTH, cos_B1TH, sin_B1TH):
    """x cos + swap(x) sin with swap(a, b) = (-b, a), the halves of a head.

    swap is a product with a constant matrix of 0, 1 and -1: exact, and on a TPU 6% of the step faster
    than moving lanes about. It turns by a right angle, so that the gradient is the rotation back.
    """
    half = x_BNTH.shape[-1] // 2
    swap_HJ = np.kron([[0, 1], [-1, 0]], np.eye(half))
    swapped_BNTH = jnp.einsum(
        "BNTH,HJ->BNTJ", x_BNTH, swap_HJ.astype(x_BNTH.dtype),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    rotated_BNTH = x_BNTH.astype(jnp.float32) * cos_B1TH + swapped_BNTH * sin_B1TH
    return rotated_BNTH.astype(x_BNTH.dtype)


def _rotate_forward(x_BNTH, cos_B1TH, sin_B1TH):
    return _rotate(x_BNTH, cos_B1TH, sin_B1TH), (cos_B1TH, sin_B1TH)


def _rotate_backward(turns, slope_BNTH):
    cos_B1TH, sin_B1TH = turns
    return _rotate(slope_BNTH, cos_B1TH, -sin_B1TH), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


POSITIONS = {
    "rope": rope,
    "learned": learned,
    "sinusoidal": sinusoidal,
    "alibi": alibi,
    "t5": t5,
    "none": none,
}
BIASED = ("alibi", "t5")  # give a bias to scores, which kernels other than our own do not take
