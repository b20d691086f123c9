"""Next-token prediction, with the vocabulary's logits a chunk of positions at a time: pretraining."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import config
from llama_jax.data import iterator
from llama_jax.model import logprobs, transformer
from llama_jax.model.context import OneSegment, Segments
from llama_jax.model.transformer import Hidden, Transformer, logits
from llama_jax.sharding import Layout
from llama_jax.train.objective import Objective, Sums
from llama_jax.train.partial import partial


def pretraining(run: config.Run, module: Transformer) -> Objective:
    """Next-token prediction as a run's settings have it, of the parameters that `optim.train` picks."""
    whole = next_token(module, run.train.loss_chunks, run.train.z_loss, run.data.segments)
    return partial(whole, module, run.optim.train)


def next_token(
    module: Transformer, chunks: int = 1, z_loss: float = 0.0, segments: str = "document"
) -> Objective:
    """All parameters are trained on nll + z_loss x log(Z)^2 (`cross_entropy`); the reported loss is the nll.

    With segments "none" attention looks at no segments: padding stands at the end of a row, where no
    token that counts can see it.
    """

    def sums(params: Any, frozen: Any, batch: Any) -> Sums:
        keys = Segments(batch.segments_BT) if segments == "document" else OneSegment()
        hidden = module.apply({"params": params}, batch.tokens_BT, batch.positions_BT, keys)
        found: Any = cross_entropy(
            hidden, batch.targets_BT, batch.weights_BT, module.layout, chunks, z_loss
        )
        total, nll = found
        weight = jnp.sum(batch.weights_BT)
        return Sums(total, weight, {"loss": (nll, weight)})

    return Objective(
        sums=sums,
        tokens=lambda batch: jnp.sum(batch.weights_BT),
        init=functools.partial(transformer.init, module),
        letters=transformer.letters(module),
        frozen={},
        params=lambda trained, frozen: trained,
        batch=iterator.abstract,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(
    hidden: Hidden,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    layout: Layout,
    chunks: int = 1,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Sums over the tokens of weight x (nll + z_loss x log(Z)^2), and of weight x nll; float32.

    nll = log Z - logit of the target, Z the sum of exponentials over V. The second term is the z-loss
    of PaLM (arXiv:2204.02311 section 5). T is cut into `chunks`, so that float32 logits of T / chunks
    positions exist at a time; under `grad` they are computed once, with their gradient, in the forward
    pass. Only the first sum is differentiated, the second is for the record.

    The fused form of `logprobs.token_logprobs`, for losses that need no number of each token.
    """
    (total, nll), _ = _over_chunks(
        hidden, targets_BT, weights_BT, layout, chunks, z_loss, with_grad=False
    )
    return total, nll


def _forward(hidden, targets_BT, weights_BT, layout, chunks, z_loss):
    return _over_chunks(hidden, targets_BT, weights_BT, layout, chunks, z_loss, with_grad=True)


def _backward(layout, chunks, z_loss, gradient, cotangents):
    total, _ = cotangents
    return jax.tree.map(lambda g: g * total.astype(g.dtype), gradient), None, None


cross_entropy.defvjp(_forward, _backward)


def _over_chunks(hidden, targets_BT, weights_BT, layout, chunks, z_loss, with_grad):
    """((total, nll), gradient as Hidden or None)."""

    def chunk(w_grad_DV: Any, inputs):
        part = Hidden(inputs[0], hidden.w_DV)
        _, targets_BT, weights_BT = inputs
        sums, gradient = _chunk(part, targets_BT, weights_BT, layout, z_loss, with_grad)
        if not with_grad:
            return None, (sums, None)
        return w_grad_DV + gradient.w_DV, (sums, gradient.x_BTD)

    inputs = [logprobs.split(array, chunks) for array in (hidden.x_BTD, targets_BT, weights_BT)]
    w_grad_DV: Any = None
    if with_grad:
        w_grad_DV = layout.rest(jnp.zeros(hidden.w_DV.shape, jnp.float32), "DV")
    summed: Any
    w_grad_DV, summed = jax.lax.scan(chunk, w_grad_DV, inputs)
    sums, x_grad = summed
    sums = jax.tree.map(jnp.sum, sums)
    if not with_grad:
        return sums, None
    x_grad_BTD = layout.act(logprobs.join(x_grad), "BTD")
    return sums, Hidden(x_grad_BTD, w_grad_DV.astype(hidden.w_DV.dtype))


def _chunk(hidden, targets_BT, weights_BT, layout, z_loss, with_grad) -> Any:
    with jax.named_scope("cross_entropy"):
        logits_BTV = layout.act(logits(hidden), "BTV")
        is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        nll_BT = log_z_BT - jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)
        nll = jnp.sum(weights_BT * nll_BT)
        total = nll + z_loss * jnp.sum(weights_BT * jnp.square(log_z_BT))
        if not with_grad:
            return (total, nll), None
        # d nll / d logit = p - [is target]; d log(Z)^2 / d logit = 2 log(Z) p
        p_BTV = jnp.exp(logits_BTV - log_z_BT[..., None])
        slope_BT1 = (weights_BT * (1 + 2 * z_loss * log_z_BT))[..., None]
        grad_BTV = p_BTV * slope_BT1 - jnp.where(is_target_BTV, weights_BT[..., None], 0)
        # Summed over chunks in float32.
        return (total, nll), logprobs.hidden_gradient(hidden, grad_BTV, layout)
