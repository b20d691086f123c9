"""A text as it is said: token by token, never half a character, and where it ends."""

from collections.abc import Collection, Sequence

from llama_jax.tokenizer.base import Tokenizer
from llama_jax.tokenizer.stream import Stream


class GeneratedText:
    """Feed tokens; `end` says why it is over: "stop" (a token or a text that ends it) or "length"."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: Sequence[int],
        end_tokens: Collection[int],
        stop: Sequence[str],
        max_tokens: int,
    ):
        """`before`: what the text goes on from; a first space after it is not dropped."""
        self._stream = Stream(tokenizer, before)
        self._end_tokens, self._stop, self._max_tokens = end_tokens, stop, max_tokens
        self._waiting = ""  # may be the beginning of a stop
        self.tokens: list[int] = []
        self.text = ""
        self.end = ""
        self.last: list[int] = []  # the token that ended it

    def feed(self, token: int) -> str:
        """What can be shown now; a text that ends has nothing waiting."""
        if token in self._end_tokens:
            self.last = [token]
            return self._over("stop", self._waiting + self._stream.finish())
        self.tokens.append(token)
        self._waiting += self._stream.feed(token)
        if len(self.tokens) == self._max_tokens:
            self._waiting += self._stream.finish()
        places = [at for text in self._stop if (at := self._waiting.find(text)) >= 0]
        if places:
            return self._over("stop", self._waiting[: min(places)])
        if len(self.tokens) == self._max_tokens:
            return self._over("length", self._waiting)
        kept = max((_overlap(self._waiting, text) for text in self._stop), default=0)
        shown, self._waiting = _split(self._waiting, len(self._waiting) - kept)
        self.text += shown
        return shown

    def cut(self) -> str:
        """What waits, of a text that was interrupted."""
        return self._over("interrupted", self._waiting + self._stream.finish())

    def _over(self, end: str, rest: str) -> str:
        self.end, self._waiting = end, ""
        self.text += rest
        return rest


def repeats(tokens: list[int]) -> bool:
    """Whether the last 32 tokens have a period of at most 8."""
    last = tokens[-32:]
    return len(last) == 32 and any(last[n:] == last[:-n] for n in range(1, 9))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _split(text: str, at: int) -> tuple[str, str]:
    return text[:at], text[at:]
