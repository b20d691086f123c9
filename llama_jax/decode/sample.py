"""Which token comes next: one drawn from the network's distribution, or from a part of it."""

import jax
import jax.numpy as jnp

from llama_jax import config

NEVER = -jnp.inf
_READ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def settings(decode: config.Decode) -> config.Decode:
    """What sampling reads, the rest at its default: programs are compiled for other values of these alone."""
    return config.Decode(**{name: getattr(decode, name) for name in _READ})


def choose(logits_BV: jax.Array, keys_B: jax.Array, decode: config.Decode) -> jax.Array:
    """Token ids [B]: the likeliest at temperature 0, else drawn, each row with its own key."""
    if not decode.temperature:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, narrowed(logits_BV, decode))
    return drawn_B.astype(jnp.int32)


# The functions below take logits [..., V]: speculative decoding samples several positions of a sequence.
def narrowed(logits: jax.Array, decode: config.Decode) -> jax.Array:
    """float32 logits of what is drawn from, at the temperature; -inf of what never is."""
    logits = logits.astype(jnp.float32) / decode.temperature
    for name, narrow in FILTERS.items():
        if (setting := getattr(decode, name)) != getattr(_ALL, name):
            logits = jnp.where(narrow(logits, setting), logits, NEVER)
    return logits


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """The k likeliest (arXiv:1805.04833 section 5.4), and what is as likely as the last of them."""
    k = min(k, logits.shape[-1])
    return logits >= jax.lax.top_k(logits, k)[0][..., -1:]


def top_p(logits: jax.Array, p: float) -> jax.Array:
    """The fewest, likeliest first, that have probability p together (arXiv:1904.09751 section 3.1)."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    descending = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(descending, axis=-1) - descending
    return jnp.take_along_axis(before < p, jnp.argsort(order, axis=-1), axis=-1)


def min_p(logits: jax.Array, p: float) -> jax.Array:
    """Those of at least p times the highest probability (arXiv:2407.01082 section 3)."""
    return logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits of tokens that were seen moved away from being chosen (CTRL, arXiv:1909.05858 section 4.1).

    Divided by the penalty, or multiplied where they are negative.
    """
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, less_BV, logits_BV)


# In this order, each of what the one before left, as Hugging Face has them.
FILTERS = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
_ALL = config.Decode()
