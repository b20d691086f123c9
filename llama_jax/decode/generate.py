"""Continue a prompt by running the whole text through the model for each new token.

No cache: right for the few tokens that training shows of itself, slow for anything longer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer


def continue_text(
    module: Transformer,
    params: Any,
    prompt: Sequence[int],
    new_tokens: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Token ids of the prompt and its continuation; temperature 0 takes the likeliest token.

    ValueError if they are more than a table of positions has rows.
    """
    length = len(prompt) + new_tokens
    if module.config.max_positions and length > module.config.max_positions:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {new_tokens} new ones do not fit into "
            f"model.max_positions={module.config.max_positions}"
        )
    rows = module.layout.row_parts  # the same row on every device
    parts = module.layout.position_parts
    filled = -(-length // parts) * parts
    tokens_BT = jnp.zeros((rows, filled), jnp.int32).at[:, : len(prompt)].set(jnp.asarray(prompt))
    finished_BT = _continue(module, params, tokens_BT, len(prompt), length, temperature, seed)
    return jax.device_get(finished_BT)[0, :length].tolist()


@functools.partial(jax.jit, static_argnames=("module", "temperature"))
def _continue(module, params, tokens_BT, first, last, temperature, seed):
    """tokens_BT with the positions from `first` to before `last` filled in."""
    rows, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length), (rows, length))

    def one(i, tokens_BT):
        hidden = module.apply({"params": params}, tokens_BT, positions_BT)
        logits_BV = transformer.logits(hidden)[:, i - 1]
        chosen_B = jnp.argmax(logits_BV, axis=-1)
        if temperature:
            key = jax.random.fold_in(jax.random.key(seed), i)
            drawn = jax.random.categorical(key, logits_BV[0] / temperature)
            chosen_B = jnp.full(rows, drawn)
        return tokens_BT.at[:, i].set(chosen_B)

    filled_BT = jax.lax.fori_loop(first, last, one, tokens_BT)
    return jax.lax.with_sharding_constraint(filled_BT, module.layout.replicated)
