"""Log-likelihood of continuations after their contexts, as multiple-choice tasks ask for it.

Requests are paths of a prefix tree: few-shot examples, a question, its choices. Each token of the tree goes
through the network once, a few rows at a time; what a row has read before, of its previous path, stays in its
cache up to where the next one parts from it. Logits are computed where a continuation asks for them alone.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.decode import engine, prefix
from llama_jax.model import cache, logprobs, transformer
from llama_jax.model.context import Cached
from llama_jax.model.transformer import Hidden, Transformer

ROWS = 16
SIZES = (16, 64, 256, 512)  # tokens of a row in one call
ANSWERS = (16, 64, 256)  # tokens whose logits are computed in one call
CALL = 64  # tokens that would take as long as what a call of few tokens spends on reading weights, about


class Continuation(NamedTuple):
    """A request: how likely are `tokens` after `context`? Neither is empty; a text begins with bos."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """Of one continuation, natural logarithms in float32."""

    logprobs: list[float]  # of each token
    is_greedy: bool  # whether each token is the likeliest (of equal logits the first)

    @property
    def total(self) -> float:
        return float(np.sum(self.logprobs, dtype=np.float64))


def loglikelihood(
    module: Transformer, params: Any, requests: Sequence[Continuation], rows: int = ROWS
) -> Iterator[tuple[int, Likelihood]]:
    """Each request's number and result, as they are done; `dict(loglikelihood(...))` has all.

    params: as `transformer.unstack(module, params)` makes them; borrowed. rows: read at a time, each with a
    cache for the longest request. A result depends on the other requests by rounding alone, and the same
    requests give the same bits. ValueError, before anything runs, on an empty context or continuation, and on
    more tokens than the network has positions.
    """
    for number, request in enumerate(requests):
        _check(module, number, request)
    return _read_all(module, params, requests, rows)


def _check(module: Transformer, number: int, request: Continuation) -> None:
    context, tokens = len(request.context), len(request.tokens)
    if not context or not tokens:
        raise ValueError(
            f"requests[{number}] has a context of {context} tokens and a continuation of {tokens}; both must "
            "have one at least: let the context begin with the tokenizer's bos"
        )
    most = module.config.max_positions
    if most and context + tokens - 1 > most:
        raise ValueError(
            f"requests[{number}] has a context of {context} tokens and a continuation of {tokens}; the "
            f"network has {most} positions: shorten the context to at most {most - tokens + 1} tokens"
        )


class _Query(NamedTuple):
    """Wanted after the token at `position` of a path: the log-probability of `target`."""

    position: int
    target: int
    request: int
    index: int  # of the target in the continuation


class _Path(NamedTuple):
    """Tokens from `start` on are new to the row that reads them; the ones before are in its cache."""

    tokens: np.ndarray
    start: int
    queries: list[_Query]  # at new tokens: of its own request, and of later ones that share them


def plan(requests: Sequence[Continuation], rows: int) -> tuple[_Path, list[list[_Path]]]:
    """What all requests begin with, and for each row the paths it reads after that, one after another.

    Rows have about as many tokens to read; where two share a prefix, both read it.
    """
    inputs = [[*request.context, *request.tokens[:-1]] for request in requests]
    order, shared = prefix.in_order(inputs)
    arrays = [np.asarray(inputs[i], np.int32) for i in order]
    trunk = min(shared[1:], default=0)
    trunk = trunk if trunk >= SIZES[0] else 0
    first = _Path(arrays[0][:trunk], 0, [])
    shared[0] = trunk
    new = np.cumsum([len(tokens) - size for tokens, size in zip(arrays, shared, strict=True)])
    row_of = np.minimum((new - 1) * rows // max(new[-1], 1), rows - 1)
    read: list[list[_Path]] = [[] for _ in range(rows)]
    for at, tokens in enumerate(arrays):
        row = read[max(row_of[at], 0)]
        if not row:
            reader = [first] * trunk  # of each position: the path in which it is new
        path = _Path(tokens, shared[at] if row else trunk, [])
        reader = [*reader[: path.start], *[path] * (len(tokens) - path.start)]
        row.append(path)
        context, targets = requests[order[at]]
        for index, target in enumerate(targets):
            position = len(context) - 1 + index
            reader[position].queries.append(_Query(position, target, order[at], index))
    return first, [[path for path in row if path.start < len(path.tokens)] for row in read]


def _read_all(module, params, requests, rows: int) -> Iterator[tuple[int, Likelihood]]:
    if not requests:
        return
    module = transformer.unstacked(module)
    first, paths = plan(requests, engine.spread_rows(module, min(rows, len(requests))))
    answers = _Answers(module, params, requests)
    length = max(len(context) + len(tokens) for context, tokens in requests)
    # With a window a cache could be smaller, but then a row could not go back to where paths part.
    slots = engine.places(dataclasses.replace(module.config, window=0), length)
    empty = functools.partial(cache.empty, module, module.config.compute_dtype, S=slots)
    if len(first.tokens):
        parts = module.layout.row_parts
        copies = [[first._replace(queries=[])] for _ in range(parts - 1)]
        kept = yield from _read_rows(module, params, empty(B=parts), [[first], *copies], answers)
        kept = _repeat(module, kept, len(paths) // parts)
    else:
        kept = empty(B=len(paths))
    yield from _read_rows(module, params, kept, paths, answers)
    yield from answers.done()


def _read_rows(module, params, kept, paths: list[list[_Path]], answers: "_Answers"):
    """Yield what is done while each row reads its paths, and return the cache after that."""
    B, slots = len(paths), cache.slots(module, kept)
    sizes = [T for T in SIZES if B * T * slots <= engine.SCORES] or [SIZES[0]]
    waiting = [deque(row) for row in paths]
    at = [row[0].start if row else 0 for row in paths]  # of the path that is being read
    while any(waiting):
        left = np.array(
            [len(row[0].tokens) - p if row else 0 for row, p in zip(waiting, at, strict=True)]
        )
        T = max(sizes, key=lambda T: np.minimum(left, T).sum() / (B * T + CALL))
        count_B = np.minimum(left, T).astype(np.int32)
        start_B = np.array(at, np.int32)
        tokens_BT = np.zeros((B, T), np.int32)
        queries: list[tuple[int, int, _Query]] = []
        for row, size in enumerate(count_B):
            if not size:
                continue
            path, stop = waiting[row][0], at[row] + size
            tokens_BT[row, :size] = path.tokens[at[row] : stop]
            queries += [
                (row, query.position - at[row], query)
                for query in path.queries
                if at[row] <= query.position < stop
            ]
            at[row] = stop
            if stop == len(path.tokens):
                waiting[row].popleft()
                at[row] = waiting[row][0].start if waiting[row] else 0
        x_BTD, kept = _read(module, params, kept, tokens_BT, start_B, count_B)
        yield from answers.done()  # of the calls before, while this one is computed
        answers.ask(x_BTD, queries)
    return kept


class _Answers:
    """Log-probabilities as they are computed, and requests that have all of theirs."""

    def __init__(self, module: Transformer, params: Any, requests: Sequence[Continuation]):
        self.module, self.params = module, params
        self.missing = [len(request.tokens) for request in requests]
        self.logprobs = [[0.0] * size for size in self.missing]
        self.greedy = [True] * len(requests)
        self.asked: list[tuple[list[_Query], tuple[jax.Array, jax.Array]]] = []

    def ask(self, x_BTD, queries: list[tuple[int, int, _Query]]) -> None:
        """Compute what is wanted after states: of each its row, its place among T, and the query."""
        for first in range(0, len(queries), ANSWERS[-1]):
            part = queries[first : first + ANSWERS[-1]]
            size = next(n for n in ANSWERS if n >= len(part))
            index = np.zeros((3, size), np.int32)
            index[:, : len(part)] = np.array([(b, t, query.target) for b, t, query in part]).T
            found = _answer(self.module, self.params, x_BTD, *index)
            self.asked.append(([query for _, _, query in part], found))

    def done(self) -> Iterator[tuple[int, Likelihood]]:
        """Requests that what was asked completes."""
        asked, self.asked = self.asked, []
        for queries, answers in asked:
            logprob_X, greedy_X = (np.asarray(x) for x in answers)
            for i, (_, _, number, index) in enumerate(queries):
                self.logprobs[number][index] = float(logprob_X[i])
                self.greedy[number] &= bool(greedy_X[i])
                self.missing[number] -= 1
                if not self.missing[number]:
                    yield number, Likelihood(self.logprobs[number], self.greedy[number])


@functools.partial(jax.jit, static_argnames="module", donate_argnames="kept")
def _read(module: Transformer, params, kept, tokens_BT, start_B, count_B):
    """Final states [B, T, D] of the first `count_B` tokens of each row, and the cache with them."""
    offset_T = jnp.arange(tokens_BT.shape[1])
    positions_BT = start_B[:, None] + offset_T
    real_BT = offset_T < count_B[:, None]
    hidden, changed = module.apply(
        {"params": params, cache.CACHE: kept}, tokens_BT, positions_BT, Cached(real_BT),
        mutable=[cache.CACHE],
    )  # fmt: skip
    return hidden.x_BTD, cache.placed(module, changed[cache.CACHE])


@functools.partial(jax.jit, static_argnames=("module", "times"))
def _repeat(module: Transformer, kept, times: int):
    return cache.placed(module, jax.tree.map(lambda held: jnp.repeat(held, times, axis=0), kept))


@functools.partial(jax.jit, static_argnames="module")
def _answer(module: Transformer, params, x_BTD, row_X, offset_X, target_X):
    """Log-probabilities of tokens after states, [X], and whether each is the likeliest."""
    w_DV = transformer.output_matrix(module.config, params)
    logits_XV = transformer.logits(Hidden(x_BTD[row_X, offset_X][None], w_DV))[0]
    found = logprobs.of_logits(logits_XV, target_X), jnp.argmax(logits_XV, axis=-1) == target_X
    return jax.lax.with_sharding_constraint(found, module.layout.replicated)
