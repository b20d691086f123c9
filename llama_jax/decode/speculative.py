"""Speculative decoding (arXiv:2211.17192): a small network proposes, the large one checks all at once.

What is said has the large network's distribution exactly (theorem 1 of appendix A.1), and at temperature 0
its tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import config
from llama_jax.decode import engine as engines
from llama_jax.decode import sample
from llama_jax.decode.engine import BatchSlots, Engine, Said
from llama_jax.model import cache, transformer
from llama_jax.model.context import Cached
from llama_jax.model.transformer import Transformer


class Both(NamedTuple):
    target: BatchSlots
    draft: BatchSlots

    @property
    def position_B(self) -> jax.Array:
        return self.target.position_B


class Speculative:
    """As an Engine, of two networks with one vocabulary. `params`: a pair, of the target and the draft."""

    def __init__(self, target: Engine, draft: Engine, proposals: int):
        """`proposals`: tokens that the draft is ahead. ValueError if the two cannot work together."""
        sizes = [one.module.config.vocab_size for one in (target, draft)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"a draft must have the vocabulary of its target: {sizes[1]} tokens, not {sizes[0]}"
            )
        if target.decode.repetition_penalty != 1:
            raise ValueError(
                f"decode.repetition_penalty={target.decode.repetition_penalty} makes the distribution of a "
                "token depend on those proposed before it; set it to 1, or leave the draft out"
            )
        self.target, self.draft, self.proposals = target, draft, proposals
        self.decode, self.window = target.decode, max(target.window, draft.window)
        self._sampling = sample.settings(target.decode)

    def rows(self, number: int, length: int) -> Both:
        length += self.proposals + 1  # what is proposed may go on after the end
        return Both(self.target.rows(number, length), self.draft.rows(number, length))

    def begin(
        self,
        params: Any,
        rows: Both,
        row: int,
        tokens: Sequence[int],
        key: jax.Array,
        start: int = 0,
        cuts: Sequence[int] = (),
    ) -> tuple[Both, Said]:
        of_target, of_draft = params
        target, said = self.target.begin(of_target, rows.target, row, tokens, key, start, cuts)
        draft, _ = self.draft.begin(of_draft, rows.draft, row, tokens, key, start, cuts)
        token_B = draft.token_B.at[row].set(said.tokens_BX[0, 0])
        return Both(target, draft._replace(token_B=token_B)), said

    def end(self, rows: Both, row: int) -> Both:
        return Both(self.target.end(rows.target, row), self.draft.end(rows.draft, row))

    def copy(self, rows: Both, source: int, to: int) -> Both:
        return Both(
            self.target.copy(rows.target, source, to), self.draft.copy(rows.draft, source, to)
        )

    def advance(self, params: Any, rows: Both) -> tuple[Both, Said]:
        """1 to `proposals` + 1 more tokens of every row. `rows` is given up."""
        networks = (self.target.module, self.draft.module)
        return advance(networks, params, self._sampling, rows, self.proposals)


@functools.partial(
    jax.jit, static_argnames=("networks", "sampling", "proposals"), donate_argnames=("rows",)
)
def advance(
    networks: tuple[Transformer, Transformer],
    params: tuple[Any, Any],
    sampling: config.Decode,
    rows: Both,
    proposals: int,
) -> tuple[Both, Said]:
    (target, draft), (target_params, draft_params) = networks, params
    X = proposals
    draft_rows, proposed_BX, draft_BXV = _propose(draft, draft_params, sampling, rows.draft, X)
    start_B = rows.target.position_B
    real_B = start_B >= 0
    tokens_BY = jnp.concatenate([rows.target.token_B[:, None], proposed_BX], axis=1)  # Y = X + 1
    positions_BY = jnp.where(real_B[:, None], start_B[:, None] + jnp.arange(X + 1), -1)
    real_BY = jnp.broadcast_to(real_B[:, None], positions_BY.shape)
    hidden, changed = target.apply(
        {"params": target_params, cache.CACHE: rows.target.cache}, tokens_BY, positions_BY,
        Cached(real_BY), mutable=[cache.CACHE],
    )  # fmt: skip
    logits_BYV = transformer.logits(hidden)
    keys_BY = engines.keys_at(rows.target.key_B[:, None], positions_BY + 1)
    if sampling.temperature:
        target_BYV = jax.nn.softmax(sample.narrowed(logits_BYV, sampling), axis=-1)
        accepted_B, last_B = accept(proposed_BX, draft_BXV, target_BYV, keys_BY)
    else:
        likeliest_BY = jnp.argmax(logits_BYV, axis=-1)
        accepted_B = _leading(proposed_BX == likeliest_BY[:, :-1])
        last_B = jnp.take_along_axis(likeliest_BY, accepted_B[:, None], axis=1)[:, 0]
    last_B = last_B.astype(jnp.int32)
    own_BY = jnp.pad(proposed_BX, ((0, 0), (0, 1)))
    said_BY = jnp.where(jnp.arange(X + 1) == accepted_B[:, None], last_B[:, None], own_BY)
    position_B = jnp.where(real_B, start_B + accepted_B + 1, -1)
    after = dict(token_B=last_B, position_B=position_B)
    target_rows = rows.target._replace(cache=changed[cache.CACHE], **after)
    said = Said(said_BY, *engines.logprobs_of(logits_BYV, said_BY, sampling), accepted_B + 1)
    draft_rows = engines.placed(draft, draft_rows._replace(**after))
    return Both(engines.placed(target, target_rows), draft_rows), engines.everywhere(target, said)


def _propose(draft, params, sampling, rows: BatchSlots, proposals: int):
    """Rows that have seen all proposals, those [B, X], and the distributions they were drawn from."""

    def one(rows: BatchSlots, _):
        logits_BV, rows = engines.step(draft, params, rows)
        keys_B = engines.keys_at(rows.key_B, rows.position_B)
        token_B = sample.choose(logits_BV, _purpose(keys_B, 0), sampling)
        given_BV = ()
        if sampling.temperature:
            given_BV = jax.nn.softmax(sample.narrowed(logits_BV, sampling), axis=-1)
        return rows._replace(token_B=token_B), (token_B, given_BV)

    rows, (tokens_XB, given_XBV) = jax.lax.scan(one, rows, length=proposals)
    _, rows = engines.step(draft, params, rows)  # the last proposal, so that it is in the cache
    return rows, tokens_XB.T, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), given_XBV)


def accept(
    proposed_BX: jax.Array, draft_BXV: jax.Array, target_BYV: jax.Array, keys_BY: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many proposals stand, and the token after them (algorithm 1).

    A proposal stands with probability min(1, p / q); the token after is drawn from max(0, p - q) where the
    next proposal fell, from p after all of them. Where rounding makes p at most q everywhere, p - q leaves
    nothing to draw from: the two are equal, and p stands for it.
    """
    chosen = lambda x_BXV: jnp.take_along_axis(x_BXV, proposed_BX[..., None], axis=-1)[..., 0]  # noqa: E731
    p_BX, q_BX = chosen(target_BYV[:, :-1]), chosen(draft_BXV)
    uniform = lambda key: jax.random.uniform(key)  # noqa: E731
    draws_BX = jax.vmap(jax.vmap(uniform))(_purpose(keys_BY[:, :-1], 1))
    accepted_B = _leading(draws_BX * q_BX < p_BX)
    at_B11 = accepted_B[:, None, None]
    p_BV = jnp.take_along_axis(target_BYV, at_B11, axis=1)[:, 0]
    nothing_BYV = jnp.pad(draft_BXV, ((0, 0), (0, 1), (0, 0)))
    q_BV = jnp.take_along_axis(nothing_BYV, at_B11, axis=1)[:, 0]
    keys_B = jnp.take_along_axis(keys_BY, accepted_B[:, None], axis=1)[:, 0]
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    rest_BV = jnp.where(jnp.any(rest_BV > 0, axis=-1, keepdims=True), rest_BV, p_BV)
    return accepted_B, jax.vmap(jax.random.categorical)(_purpose(keys_B, 2), jnp.log(rest_BV))


def _leading(true_BX):
    """The number of True before the first False of each row."""
    return jnp.sum(jnp.cumprod(true_BX.astype(jnp.int32), axis=1), axis=1)


def _purpose(keys, purpose: int):
    """Draws for different ends are independent."""
    fold = lambda key: jax.random.fold_in(key, purpose)  # noqa: E731
    for _ in keys.shape:
        fold = jax.vmap(fold)
    return fold(keys)
