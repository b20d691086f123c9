"""Continue sequences in a few batch slots, each taken over by the next request when its own has ended."""

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax import config
from llama_jax.decode import prefix
from llama_jax.decode.engine import Engine, Said
from llama_jax.decode.speculative import Speculative
from llama_jax.decode.text import GeneratedText
from llama_jax.tokenizer.base import Tokenizer

WORTH = 16  # tokens that are worth a chunk of their own: as many as the smallest chunk takes


class Request(NamedTuple):
    """A prompt as tokens. What is sampled depends on `seed` and `stream` alone."""

    tokens: list[int]
    max_new_tokens: int
    seed: int = 0
    stream: tuple[int, int] = (0, 0)  # which prompt, which sample of it


class Completion(NamedTuple):
    """A continuation. What was sampled is `tokens + last`; both lists of log-probabilities are as long."""

    tokens: list[int]  # new ones, without one that ends the sequence
    logprobs: list[float]  # nats, of the network's own distribution: softmax(logits)
    tempered: list[float]  # nats, of softmax(logits / temperature); 0 at temperature 0
    text: str
    end: str  # "stop", "length" or "interrupted"
    last: list[int]  # the end token, if one ended the sequence


class _Row:
    """A sequence that is being continued."""

    def __init__(self, number: int, text: GeneratedText):
        self.number, self.text = number, text
        self.logprobs: list[float] = []
        self.tempered: list[float] = []

    def feed(self, tokens, logprobs, tempered, listen) -> None:
        for token, *likely in zip(tokens, logprobs, tempered, strict=True):
            if shown := self.text.feed(int(token)):
                listen(self.number, shown)
            self.logprobs.append(float(likely[0]))
            self.tempered.append(float(likely[1]))
            if self.text.end:
                return

    def result(self) -> tuple[int, Completion]:
        text = self.text
        likely = self.logprobs, self.tempered
        return self.number, Completion(text.tokens, *likely, text.text, text.end, text.last)


class Decoder:
    """Batch slots of an engine that requests go through, as many as there are.

    A prefix that prompts share goes through the network once (`prefix.cuts`): samples of one prompt, few-shot
    examples before each question, a conversation and what was said since. What is reused was computed by the
    parameters of this call: arrays other than those of the call before, told apart by identity, begin with
    empty caches.

    Prompts are read one at a time: products over several of them round otherwise, and a continuation would
    depend on what is read beside it. As it is, the bits of a result depend on the requests of its run, not
    on their order or on the rows they fall into; on what earlier runs left in the caches (`forget` drops
    it); and, by rounding, on the number of rows, the length and the mesh.
    """

    def __init__(
        self,
        engine: Engine | Speculative,
        tokenizer: Tokenizer,
        end_tokens: Collection[int],
        rows: int,
        length: int,
    ):
        """For sequences of at most `length` tokens, prompt and continuation."""
        self.engine, self.tokenizer, self.end_tokens = engine, tokenizer, end_tokens
        self.length = length
        self.rows: Any = engine.rows(rows, length)  # BatchSlots, or Both of a Speculative
        self.held: list[Sequence[int]] = [()] * rows  # the sequence in each row's cache
        self._owner: list[weakref.ref] = []  # the parameters that computed the caches

    def run(
        self,
        params: Any,
        requests: Sequence[Request],
        listen: Callable[[int, str], None] = lambda number, text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Completion]]:
        """Each request's number and result, as they end.

        params: as the engine takes them, `transformer.unstack(module, params)`; they are borrowed, and not
        kept. listen(number, text): more of a text is there. stopped(), asked once a round: whether to end all
        texts as they are. ValueError, before anything runs, on a request that the decoder has no room for.
        """
        for number, request in enumerate(requests):
            self._check(number, request)
        self._follow(params)
        active: set[int] = set()  # rows that advance: they go on until they are ended
        try:
            yield from self._run(params, requests, listen, stopped, active)
        finally:  # also after an exception, and when nobody asks for the rest
            self._end(active)

    def forget(self) -> None:
        """Begin with empty caches, as after other parameters."""
        self.held = [()] * len(self.held)

    def _follow(self, params: Any) -> None:
        leaves = jax.tree.leaves(params)
        before = [owner() for owner in self._owner]
        if len(leaves) != len(before) or any(
            a is not b for a, b in zip(leaves, before, strict=True)
        ):
            self.forget()
            self._owner = [weakref.ref(leaf) for leaf in leaves]

    def _run(self, params, requests, listen, stopped, active) -> Iterator[tuple[int, Completion]]:
        waiting = deque(zip(range(len(requests)), requests, self._cuts(requests), strict=True))
        # Of `held` what was read as a prompt, or left by an earlier run.
        read = [np.asarray(tokens, np.int64) for tokens in self.held]
        texts: list[_Row | None] = [None] * len(self.held)
        while waiting or any(texts):
            stop = stopped()
            begun: deque[tuple[_Row, Said]] = deque()
            for row in range(len(texts)):
                if texts[row] is None and waiting and not stop:
                    number, request, cuts = waiting.popleft()
                    active.add(row)
                    said = self._begin(params, row, request, cuts, read)
                    texts[row] = one = _Row(number, self._text(request))
                    begun.append((one, said))
                # Wait for no token while there are prompts to dispatch.
                while begun and (row + 1 == len(texts) or _is_ready(begun[0][1])):
                    one, said = begun.popleft()
                    one.feed(*(np.asarray(x)[0] for x in said[:3]), listen=listen)
            if not stop and all(one is None or not one.text.end for one in texts):
                self.rows, said = self.engine.advance(params, self.rows)
                *parts, count_B = (np.asarray(x) for x in said)
                for row, one in enumerate(texts):
                    if one is not None:
                        one.feed(*(x_BX[row, : count_B[row]] for x_BX in parts), listen=listen)
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
        size, new = len(request.tokens), request.max_new_tokens
        if not size or new < 1:
            raise ValueError(
                f"requests[{number}] has {size} tokens and max_new_tokens={new}; both must be at least 1"
            )
        if size + new > self.length:
            room = self.length - size
            way = (
                f"max_new_tokens={room}" if room > 0 else f"a prompt of {self.length - new} tokens"
            )
            raise ValueError(
                f"requests[{number}] has {size} tokens and max_new_tokens={new}; together they must be at "
                f"most {self.length}, the length that this decoder was made for; try {way}"
            )
        config.check_seed(request.seed, f"requests[{number}].seed")

    def _end(self, rows: Collection[int]) -> None:
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.rows)):
            # A call that was interrupted had taken the arrays over.
            self.rows = self.engine.rows(len(self.held), self.length)
            self.forget()
            return
        for row in rows:
            self.rows = self.engine.end(self.rows, row)

    def _cuts(self, requests: Sequence[Request]) -> list[list[int]]:
        """Where the prompt of each is cut, so that another may go on from there."""
        if self.engine.window:  # the beginning may have given way
            return [[] for _ in requests]
        # Of what is held the last token may be reused, too: nobody asks what comes after it.
        held = [[*tokens, -1] for tokens in self.held if tokens]
        prompts = [request.tokens for request in requests]
        return prefix.cuts([*prompts, *held], WORTH)[: len(requests)]

    def _begin(self, params, row: int, request: Request, cuts: list[int], read: list) -> Said:
        """Read a prompt into a row, from the last of its cuts on that some row has in its cache."""
        tokens, start = np.asarray(request.tokens), 0
        if cuts:
            equal = [prefix.common(other, tokens) for other in read]
            starts = [max((cut for cut in cuts if cut <= size), default=0) for size in equal]
            start, _, holder = max((starts[at], at == row, at) for at in range(len(read)))
            if start and holder != row:
                self.rows = self.engine.copy(self.rows, holder, row)
        self.held[row], read[row] = (), tokens[:0]  # until all of the prompt is there
        key = key_of(request)
        self.rows, said = self.engine.begin(
            params, self.rows, row, request.tokens, key, start, cuts
        )
        self.held[row], read[row] = request.tokens, tokens
        return said

    def _text(self, request: Request) -> GeneratedText:
        stop = self.engine.decode.stop
        return GeneratedText(
            self.tokenizer, request.tokens, self.end_tokens, stop, request.max_new_tokens
        )


def _is_ready(said: Any) -> bool:
    return said.tokens_BX.is_ready()  # jax.Array leaves it out of its annotations


def key_of(request: Request) -> jax.Array:
    key = jax.random.key(request.seed)
    for number in request.stream:
        key = jax.random.fold_in(key, number)
    return key
