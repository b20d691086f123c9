"""How surprised a network is by text: nats of each token, in windows of any length."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model import logprobs, transformer
from llama_jax.model.transformer import Transformer

LOGITS_BYTES = 1 << 28  # of float32 logits at a time, about


@functools.partial(jax.jit, static_argnames="module")
def token_nll(module: Transformer, params: Any, tokens_BU: jax.Array) -> jax.Array:
    """Nats of every token but the first of its row, float32 [B, T], U = T + 1; one segment a row.

    The vocabulary's logits exist for a part of the positions at a time.
    """
    inputs_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:]
    B, T = inputs_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden: Any = transformer.portable(module).apply({"params": params}, inputs_BT, positions_BT)
    chunks = logprobs.chunks_within(hidden, LOGITS_BYTES)
    nll_BT = -logprobs.token_logprobs(hidden, targets_BT, module.layout, chunks=chunks)
    return jax.lax.with_sharding_constraint(nll_BT, module.layout.replicated)


class WindowScores(NamedTuple):
    """Of the same tokens, read in windows of one length."""

    row_R: np.ndarray  # mean nats a token of each row of T tokens
    position_T: np.ndarray  # mean nats a token at each position of the window


def windows(
    module: Transformer, params: Any, rows: np.ndarray, times: int, tokens_at_once: int
) -> WindowScores:
    """Score rows [R, T + 1], each of which begins with the last token of the one before, `times` joined.

    R must be a multiple of `times`. tokens_at_once: about so many go through the network together.
    """
    R, T = len(rows), rows.shape[1] - 1
    long_rows = np.concatenate([rows[::times, :1], rows[:, 1:].reshape(-1, times * T)], axis=1)
    found = np.concatenate(list(_batches(module, params, long_rows, tokens_at_once)))
    return WindowScores(found.reshape(R, T).mean(1), found.mean(0))


def _batches(module, params, rows: np.ndarray, tokens_at_once: int) -> Iterator[np.ndarray]:
    parts = module.layout.row_parts
    size = max(tokens_at_once // (rows.shape[1] * parts), 1) * parts
    own = module.layout.host_rows(size)
    for first in range(0, len(rows), size):
        real = rows[first : first + size].astype(np.int32)
        filled = np.concatenate([real, np.repeat(real[-1:], size - len(real), axis=0)])
        tokens_BU = module.layout.put(filled[own], "BT", size)
        yield np.asarray(token_nll(module, params, tokens_BU))[: len(real)]
