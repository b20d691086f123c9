"""The programs of decoding: rows of text that go on, each at its own position, a few tokens at a call.

Shapes come in steps (`places`, `CHUNKS`), so that a session compiles a handful of programs. What a row says
depends on its own tokens and key alone.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from llama_jax import config
from llama_jax.decode import sample
from llama_jax.model import cache, logprobs, transformer
from llama_jax.model.context import Cached
from llama_jax.model.transformer import Transformer

CHUNKS = (16, 64, 256, 512)  # tokens of a prompt at a time
# Scores of a head that a chunk may have, 64 MiB: with 128k places a chunk is of 64 tokens.
SCORES = 1 << 24
STEPS = 8  # tokens of each row between two looks at what was said


class BatchSlots(NamedTuple):
    """B rows between two calls. `token_B` is what each row said last; the cache has what is before it."""

    cache: Any
    token_B: jax.Array
    position_B: jax.Array  # of that token; -1 of a row that is idle
    key_B: jax.Array
    seen_BV: jax.Array | None = None  # tokens of the row, for a repetition penalty


class Said(NamedTuple):
    """Of each row the first `count_B` are said."""

    tokens_BX: jax.Array
    logprobs_BX: jax.Array  # of the network's own distribution, before temperature and filters
    tempered_BX: (
        jax.Array
    )  # of softmax(logits / temperature), before penalty and filters; 0 at temperature 0
    count_B: jax.Array


class Engine:
    """The programs of a network and how to sample from it.

    It borrows parameters: every call is given them as `transformer.unstack` makes them, and keeps none. Other
    parameters or another seed compile nothing. Keys and values in `BatchSlots` are of the parameters that
    computed them: with others begin every row anew (generate.py does).
    """

    def __init__(self, module: Transformer, decode: config.Decode):
        """`module`: as `transformer.build` makes it."""
        self.module = transformer.unstacked(module)
        self.decode, self._sampling = decode, sample.settings(decode)

    @property
    def window(self) -> int:
        return self.module.config.window

    def rows(self, number: int, length: int) -> BatchSlots:
        """Idle rows for texts of at most `length` tokens."""
        module, decode = self.module, self.decode
        dtype = module.config.compute_dtype if decode.cache == "compute" else decode.cache
        number = spread_rows(module, number)
        kept = cache.empty(module, dtype, B=number, S=places(module.config, length))

        def rest():
            seen = None
            if decode.repetition_penalty != 1:
                seen = jnp.zeros((number, module.config.vocab_size), bool)
            last, position = jnp.zeros(number, jnp.int32), jnp.full(number, -1, jnp.int32)
            return last, position, jax.random.split(jax.random.key(0), number), seen

        # Placed as calls leave them: else the second call would compile again.
        return BatchSlots(kept, *jax.jit(rest, out_shardings=module.layout.replicated)())

    def begin(
        self,
        params: Any,
        rows: BatchSlots,
        row: int,
        tokens: Sequence[int],
        key: jax.Array,
        start: int = 0,
        cuts: Sequence[int] = (),
    ) -> tuple[BatchSlots, Said]:
        """A row begins with the prompt `tokens` and says one more. `rows` is given up.

        `start` of them are in its cache already. No chunk goes across one of `cuts`, ascending: what is kept
        up to there has the same bits whatever follows. ValueError if a prompt has more tokens than the cache
        has slots, unless attention has a window.
        """
        said: Any = None
        seen_V = None
        slots = cache.slots(self.module, rows.cache)
        if len(tokens) > slots and not self.window:
            raise ValueError(
                f"row {row}: a prompt of {len(tokens)} tokens needs as many cache slots, but there are "
                f"{slots}; make rows for a length of {len(tokens)} or more"
            )
        most = SCORES // slots
        chunks = [size for size in CHUNKS if size <= max(most, CHUNKS[0])]
        if rows.seen_BV is not None:
            seen_V = np.zeros(rows.seen_BV.shape[1], bool)
            seen_V[list(tokens)] = True
        while start < len(tokens):
            stop = next((cut for cut in cuts if cut > start), len(tokens))
            part = tokens[start : min(start + chunks[-1], stop)]
            size = next(n for n in chunks if n >= len(part))
            filled = np.zeros(size, np.int32)
            filled[: len(part)] = part
            rows, said = begin(
                *(self.module, params, self._sampling, rows),
                *(filled, start, len(part), row, key, seen_V),
            )
            start += len(part)
        return rows, said

    def end(self, rows: BatchSlots, row: int) -> BatchSlots:
        """The row is idle; what it holds stays."""
        return rows._replace(position_B=rows.position_B.at[row].set(-1))

    def copy(self, rows: BatchSlots, source: int, to: int) -> BatchSlots:
        """The row `to` holds the text of the row `source`."""
        return rows._replace(cache=copy(rows.cache, source, to))

    def advance(self, params: Any, rows: BatchSlots) -> tuple[BatchSlots, Said]:
        """More tokens of every row. `rows` is given up."""
        return advance(self.module, params, self._sampling, rows, STEPS)


def spread_rows(module: Transformer, number: int) -> int:
    """At least `number`, as many on each device."""
    return -(-number // module.layout.row_parts) * module.layout.row_parts


def places(model: config.Model, length: int) -> int:
    """Of a cache for texts of `length` tokens: a multiple of 128, of long texts up to an eighth more.

    Of a network with a window no more than it sees and a chunk of the prompt.
    """
    # A text that has ended goes on to the end of a call, and must not come round to its own beginning.
    length += STEPS
    if model.window:
        length = min(length, model.window + CHUNKS[-1])
    step = max((1 << (length - 1).bit_length()) // 16, 128)
    return -(-length // step) * step


@functools.partial(jax.jit, static_argnames=("module", "sampling"), donate_argnames=("rows",))
def begin(
    module: Transformer,
    params: Any,
    sampling: config.Decode,
    rows: BatchSlots,
    tokens_T: jax.Array,
    start: ArrayLike,
    length: ArrayLike,
    row: ArrayLike,
    key: jax.Array,
    seen_V: jax.Array | None,
) -> tuple[BatchSlots, Said]:
    """The tokens `start` to `start + length` of a row's prompt, and what it says after them.

    seen_V: those of the whole prompt, for a repetition penalty.
    """
    T, copies = tokens_T.shape[0], module.layout.row_parts
    of_row = jax.tree.map(lambda held: held[row][None].repeat(copies, 0), rows.cache)
    positions_BT = jnp.broadcast_to(start + jnp.arange(T), (copies, T))
    real_BT = jnp.broadcast_to(jnp.arange(T) < length, (copies, T))
    tokens_BT = jnp.broadcast_to(tokens_T, (copies, T))
    hidden, changed = module.apply(
        {"params": params, cache.CACHE: of_row}, tokens_BT, positions_BT, Cached(real_BT),
        mutable=[cache.CACHE],
    )  # fmt: skip
    last = hidden._replace(x_BTD=jax.lax.dynamic_slice_in_dim(hidden.x_BTD, length - 1, 1, axis=1))
    logits_1V = transformer.logits(last)[:1, 0]
    seen_1V = None if seen_V is None else seen_V[None]
    end_1 = jnp.full(1, start + length)
    one = BatchSlots(changed[cache.CACHE], tokens_T[:1], end_1, key[None], seen_1V)
    one, *likely = _said(sampling, logits_1V, one)
    rows = placed(module, jax.tree.map(lambda held, new: held.at[row].set(new[0]), rows, one))
    said = Said(*(x_1[:, None] for x_1 in (one.token_B, *likely)), count_B=jnp.ones(1, jnp.int32))
    return rows, everywhere(module, said)


@functools.partial(
    jax.jit, static_argnames=("module", "sampling", "steps"), donate_argnames=("rows",)
)
def advance(
    module: Transformer, params: Any, sampling: config.Decode, rows: BatchSlots, steps: int
) -> tuple[BatchSlots, Said]:
    """`steps` more tokens of every row."""

    def one(rows: BatchSlots, _):
        logits_BV, rows = step(module, params, rows)
        rows, *likely = _said(sampling, logits_BV, rows)
        return rows, (rows.token_B, *likely)

    alone = len(rows.token_B) == 1
    if alone:
        rows = rows._replace(cache=cache.without_rows(rows.cache))
    rows, said = jax.lax.scan(one, rows, length=steps)
    if alone:
        rows = rows._replace(cache=cache.with_rows(rows.cache))
    rows = placed(module, rows)
    said = Said(*(x_XB.T for x_XB in said), count_B=jnp.full(len(rows.token_B), steps))
    return rows, everywhere(module, said)


def placed(module: Transformer, rows: BatchSlots) -> BatchSlots:
    """As `Engine.rows` places them."""
    kept = cache.placed(module, rows.cache)
    rest = jax.lax.with_sharding_constraint(rows[1:], module.layout.replicated)
    return BatchSlots(kept, *rest)


def everywhere(module: Transformer, said: Said) -> Said:
    """For every host to read."""
    return jax.lax.with_sharding_constraint(said, module.layout.replicated)


@functools.partial(jax.jit, donate_argnames=("held",))
def copy(held: Any, source: ArrayLike, to: ArrayLike) -> Any:
    return jax.tree.map(lambda x: x.at[to].set(x[source]), held)


def step(module: Transformer, params: Any, rows: BatchSlots) -> tuple[jax.Array, BatchSlots]:
    """Logits of the next token of every row; the last one is in the cache, and the position its."""
    real_B = rows.position_B >= 0
    hidden, changed = module.apply(
        {"params": params, cache.CACHE: rows.cache}, rows.token_B[:, None],
        rows.position_B[:, None], Cached(real_B[:, None]), mutable=[cache.CACHE],
    )  # fmt: skip
    logits_BV = transformer.logits(hidden)[:, 0]
    return logits_BV, rows._replace(cache=changed[cache.CACHE], position_B=rows.position_B + real_B)


def _said(sampling, logits_BV, rows: BatchSlots) -> tuple[BatchSlots, jax.Array, jax.Array]:
    """Rows with the tokens sampled for their positions; log-probabilities untempered and tempered [B]."""
    own_BV, seen_BV = logits_BV, rows.seen_BV
    if seen_BV is not None:
        logits_BV = sample.penalised(logits_BV, seen_BV, sampling.repetition_penalty)
    token_B = sample.choose(logits_BV, keys_at(rows.key_B, rows.position_B), sampling)
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    rows = rows._replace(token_B=token_B, seen_BV=seen_BV)
    return rows, *logprobs_of(own_BV, token_B, sampling)


def logprobs_of(
    logits: jax.Array, tokens: jax.Array, sampling: config.Decode
) -> tuple[jax.Array, jax.Array]:
    """Of sampled tokens: untempered, and at the sampling temperature. Any dimensions before V."""
    own = logprobs.of_logits(logits, tokens)
    if sampling.temperature in (0, 1):
        return own, own if sampling.temperature else jnp.zeros_like(own)
    return own, logprobs.of_logits(logits, tokens, sampling.temperature)


def keys_at(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """The key of each position, of the text's own [positions' shape]."""
    fold = jax.random.fold_in
    for _ in positions.shape:
        fold = jax.vmap(fold)
    return fold(jnp.broadcast_to(keys, positions.shape), positions)
