"""Continue texts: a few rows at a time, each row taken over by the next text when its own has ended."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from llama_jax import config
from llama_jax.decode.engine import Engine
from llama_jax.decode.text import Text
from llama_jax.tokenizer.base import Tokenizer

WORTH = 16  # tokens that are worth keeping: as many as the smallest chunk takes


class Request(NamedTuple):
    """A prompt as tokens. Its draws depend on `seed` and `stream` alone."""

    tokens: list[int]
    max_new_tokens: int
    seed: int = 0
    stream: tuple[int, int] = (0, 0)  # which prompt, which sample of it


class Result(NamedTuple):
    tokens: list[int]  # new ones, without one that ends the text
    logprobs: list[float]  # of each, as the network has it
    text: str
    end: str  # "stop", "length" or "interrupted"
    last: list[int]  # the token that ended the text, if one did


class _Row:
    """A text that is on."""

    def __init__(self, number: int, text: Text):
        self.number, self.text, self.logprobs = number, text, []

    def feed(self, tokens, logprobs, listen) -> None:
        for token, logprob in zip(tokens, logprobs, strict=True):
            if shown := self.text.feed(int(token)):
                listen(self.number, shown)
            if len(self.text.tokens) > len(self.logprobs):
                self.logprobs.append(float(logprob))
            if self.text.end:
                return

    def result(self) -> tuple[int, Result]:
        text = self.text
        return self.number, Result(text.tokens, self.logprobs, text.text, text.end, text.last)


class Decoder:
    """Rows of an engine (engine.py, or speculative.py) that texts go through, as many as there are.

    What requests have in common at their beginning goes through the network once, and so does what a
    single request has in common with the text before.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        end_tokens: Collection[int],
        rows: int,
        length: int,
    ):
        """For texts of at most `length` tokens, prompts and all."""
        self.engine, self.tokenizer, self.end_tokens = engine, tokenizer, end_tokens
        self.length = length
        self.rows = engine.rows(rows, length)
        self.held: list[Sequence[int]] = [()] * rows  # the text that is in each row's cache
        self._version = engine.version  # of the parameters that computed the caches

    def run(
        self,
        requests: Sequence[Request],
        listen: Callable[[int, str], None] = lambda number, text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Result]]:
        """Each request's number and result, as they end.

        listen(number, text): more of a text is there. stopped(), asked once a round: whether to end all texts
        as they are. ValueError, before anything runs, on a request that the decoder has no room for.
        """
        for number, request in enumerate(requests):
            self._check(number, request)
        if self._version != self.engine.version:
            self.held, self._version = [()] * len(self.held), self.engine.version
        active: set[int] = set()  # rows that advance: they go on until they are ended
        try:
            yield from self._run(requests, listen, stopped, active)
        finally:  # also after an exception, and when nobody asks for the rest
            self._end(active)

    def _run(self, requests, listen, stopped, active: set[int]) -> Iterator[tuple[int, Result]]:
        if not requests:
            return
        waiting = deque(enumerate(requests))
        shared = self._shared(requests)
        texts: list[_Row | None] = [None] * len(self.held)
        while waiting or any(texts):
            stop = stopped()
            for row in range(len(texts)):
                if texts[row] is None and waiting and not stop:
                    number, request = waiting.popleft()
                    active.add(row)
                    texts[row] = self._begin(row, number, request, shared, listen)
            if not stop and all(one is None or not one.text.end for one in texts):
                self.rows, said = self.engine.advance(self.rows)
                tokens_BX, logprobs_BX, count_B = (np.asarray(x) for x in said)
                for row, one in enumerate(texts):
                    if one is not None:
                        n = count_B[row]
                        one.feed(tokens_BX[row, :n], logprobs_BX[row, :n], listen)
            for row, one in enumerate(texts):
                if one is None:
                    continue
                if stop and not one.text.end:
                    listen(one.number, one.text.cut())
                if one.text.end:
                    # The last token need not have gone through the network.
                    self.held[row] = [*self.held[row], *one.text.tokens[:-1]]
                    if not waiting:
                        self._end({row})
                        active.discard(row)
                    yield one.result()
                    texts[row] = None
            if stop:
                return

    def _check(self, number: int, request: Request) -> None:
        new, total = request.max_new_tokens, len(request.tokens) + request.max_new_tokens
        if not request.tokens or new < 1:
            raise ValueError(
                f"requests[{number}] has {len(request.tokens)} tokens and max_new_tokens={new}; both "
                "must be at least 1"
            )
        if total > self.length:
            raise ValueError(
                f"requests[{number}] has {len(request.tokens)} tokens and max_new_tokens={new}; together "
                f"they must be at most {self.length}, for which this decoder was made"
            )
        config.check_seed(request.seed, f"requests[{number}].seed")

    def _end(self, rows: Collection[int]) -> None:
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.rows)):
            # A call that was interrupted had taken the arrays over.
            self.rows = self.engine.rows(len(self.held), self.length)
            self.held = [()] * len(self.held)
            return
        for row in rows:
            self.rows = self.engine.end(self.rows, row)

    def _shared(self, requests: Sequence[Request]) -> int:
        """So many tokens at the beginning are the same in all."""
        if self.engine.window:  # the beginning may have given way
            return 0
        texts = [request.tokens for request in requests]
        if len(texts) == 1:
            texts.append(self.held[0])
        same = min((_same(texts[0], text) for text in texts[1:]), default=0)
        same = min(same, *(len(request.tokens) - 1 for request in requests))
        return same if same >= WORTH else 0

    def _begin(self, row, number, request, shared, listen) -> _Row:
        tokens = request.tokens
        holder = next(
            (at for at in (row, *range(len(self.held))) if _same(self.held[at], tokens) >= shared),
            None,
        )
        if shared and holder is not None and holder != row:
            self.rows = self.engine.copy(self.rows, holder, row)
        start = shared if holder is not None else 0
        self.held[row] = ()  # until all of the prompt is there
        self.rows, said = self.engine.begin(
            self.rows, row, tokens, key_of(request), start, pause=shared
        )
        self.held[row] = tokens
        text = Text(
            self.tokenizer, tokens, self.end_tokens, self.engine.decode.stop, request.max_new_tokens
        )
        one = _Row(number, text)
        one.feed(*(np.asarray(x)[0] for x in said[:2]), listen)
        return one


def key_of(request: Request) -> jax.Array:
    key = jax.random.key(request.seed)
    for number in request.stream:
        key = jax.random.fold_in(key, number)
    return key


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
