"""Log-probabilities of tokens, differentiable, with float32 logits of a chunk of the positions at a time.

Scoring, decoding and every loss that needs a number for each token use these. Where a loss needs the sum
alone, `train/loss.cross_entropy` is the fused form: its gradient is computed in the forward pass, one product
with the output matrix less. Everything is in nats and float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.quantised import Quantised
from llama_jax.model.transformer import Hidden, logits
from llama_jax.sharding import Layout


def token_logprobs(
    hidden: Hidden,
    targets_BT: jax.Array,
    layout: Layout,
    temperature: float = 1.0,
    chunks: int = 1,
) -> jax.Array:
    """log softmax(logits / temperature) at the targets, float32 [B, T].

    T is cut into `chunks`, which must divide it; logits of T / chunks positions exist at a time, and the
    backward pass computes them a second time. Gradients go to `hidden`, to the states alone where its matrix
    is quantised. ValueError for other chunks, or a temperature that is not positive.
    """
    found: Any = _of_hidden(hidden, targets_BT, layout, *_checked(targets_BT, temperature, chunks))
    return found[0]


def token_logprobs_and_entropy(
    hidden: Hidden,
    targets_BT: jax.Array,
    layout: Layout,
    temperature: float = 1.0,
    chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs`, and the entropy of softmax(logits / temperature): float32 [B, T], differentiable."""
    temperature, chunks = _checked(targets_BT, temperature, chunks)
    return _of_hidden(hidden, targets_BT, layout, temperature, chunks, entropy=True)


def of_logits(rows: jax.Array, targets: jax.Array, temperature: float = 1.0) -> jax.Array:
    """log softmax(logits / temperature) at the targets, float32, of logits with any dimensions before V.

    For a few positions, as decoding has them: targets are gathered from whole rows of logits.
    """
    rows = rows.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(rows, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(rows, axis=-1)


def chunks_within(hidden: Hidden, limit_bytes: int) -> int:
    """The fewest chunks of T whose float32 logits take at most so many bytes; T if a position takes more."""
    B, T = hidden.x_BTD.shape[:2]
    least = min(4 * B * T * hidden.w_DV.shape[1] / limit_bytes, T)
    return next(n for n in range(1, T + 1) if T % n == 0 and n >= least)


def split(array: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...], position t to chunk t mod chunks.

    So rows and positions stay on their devices.
    """
    B, T = array.shape[:2]
    return jnp.moveaxis(array.reshape(B, T // chunks, chunks, *array.shape[2:]), 2, 0)


def join(array: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    chunks, B, X = array.shape[:3]
    return jnp.moveaxis(array, 0, 2).reshape(B, X * chunks, *array.shape[3:])


def hidden_gradient(hidden: Hidden, grad_BTV: jax.Array, layout: Layout) -> Hidden:
    """The gradient of `hidden` from that of its logits, in the dtype of the states.

    A weight's gradient is reduced over the devices in the compute dtype, as every gradient.
    """
    grad_BTV = grad_BTV.astype(hidden.x_BTD.dtype)
    x_grad_BTD = layout.act(jnp.einsum("BTV,DV->BTD", grad_BTV, hidden.w_DV), "BTD")
    return Hidden(x_grad_BTD, layout.rest(jnp.einsum("BTD,BTV->DV", hidden.x_BTD, grad_BTV), "DV"))


def _checked(targets_BT, temperature: float, chunks: int) -> tuple[float, int]:
    T = targets_BT.shape[1]
    if T % chunks:
        nearest = min((n for n in range(1, T + 1) if T % n == 0), key=lambda n: abs(n - chunks))
        raise ValueError(f"chunks={chunks} must divide the {T} positions; try {nearest}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; 1.0 is the network's own")
    return temperature, chunks


def _is_target(logits_BTV, targets_BT):
    return targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _of_hidden(
    hidden: Hidden,
    targets_BT,
    layout: Layout,
    temperature: float,
    chunks: int,
    entropy: bool = False,
):
    """(log-probabilities, entropies or None), each [B, T]."""

    def chunk(inputs):
        x_BTD, targets_BT = inputs
        with jax.named_scope("token_logprobs"):
            logits_BTV = layout.act(logits(Hidden(x_BTD, hidden.w_DV)), "BTV") / temperature
            # By comparison: a gather would want V, spread over devices, whole on each.
            chosen_BTV = jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0)
            logprobs_BT = jnp.sum(chosen_BTV, axis=-1) - jax.nn.logsumexp(logits_BTV, axis=-1)
            return logprobs_BT, _entropy(logits_BTV)[0] if entropy else None

    inputs = split(hidden.x_BTD, chunks), split(targets_BT, chunks)
    return jax.tree.map(join, jax.lax.map(chunk, inputs))


def _entropy(logits_BTV):
    """-sum p log p [B, T], and log p [B, T, V]."""
    log_p_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    return -jnp.sum(jnp.exp(log_p_BTV) * log_p_BTV, axis=-1), log_p_BTV


def _forward(hidden, targets_BT, layout, temperature, chunks, entropy):
    out = _of_hidden(hidden, targets_BT, layout, temperature, chunks, entropy)
    return out, (hidden, targets_BT)


def _backward(layout, temperature, chunks, entropy, kept, slopes):
    """With y = logits / temperature: d log p(target) / dy = [is target] - p, dH / dy = -p (log p + H)."""
    hidden, targets_BT = kept
    w_DV = hidden.w_DV
    frozen = isinstance(w_DV, Quantised)

    def chunk(w_grad_DV, inputs):
        x_BTD, targets_BT, slope_BT, entropy_slope_BT = inputs
        with jax.named_scope("token_logprobs"):
            part = Hidden(x_BTD, w_DV)
            logits_BTV = layout.act(logits(part), "BTV") / temperature
            entropy_BT, log_p_BTV = _entropy(logits_BTV)
            p_BTV = jnp.exp(log_p_BTV)
            grad_BTV = (_is_target(p_BTV, targets_BT) - p_BTV) * slope_BT[..., None]
            if entropy:
                more_BTV = p_BTV * (log_p_BTV + entropy_BT[..., None])
                grad_BTV -= more_BTV * entropy_slope_BT[..., None]
            grad_BTV /= temperature
            if frozen:
                dense = part._replace(w_DV=w_DV.dense(x_BTD.dtype))
                return w_grad_DV, hidden_gradient(dense, grad_BTV, layout).x_BTD
            gradient = hidden_gradient(part, grad_BTV, layout)
            return w_grad_DV + gradient.w_DV, gradient.x_BTD

    inputs = jax.tree.map(
        functools.partial(split, chunks=chunks), (hidden.x_BTD, targets_BT, *slopes)
    )
    w_grad_DV: Any = None if frozen else layout.rest(jnp.zeros(w_DV.shape, jnp.float32), "DV")
    w_grad_DV, x_grad = jax.lax.scan(chunk, w_grad_DV, inputs)
    if frozen:
        w_grad_DV = jax.tree.map(_no_gradient, w_DV)
    else:
        w_grad_DV = w_grad_DV.astype(w_DV.dtype)
    return Hidden(layout.act(join(x_grad), "BTD"), w_grad_DV), None


def _no_gradient(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return jnp.zeros_like(leaf)


_of_hidden.defvjp(_forward, _backward)
