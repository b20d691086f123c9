"""Decode ids one at a time into text that is never half a character."""

import codecs
from collections.abc import Sequence

from llama_jax.tokenizer.base import Tokenizer


class Stream:
    """Feed ids, get text: all of it, with that of `finish`, is `tokenizer.decode` of all ids.

    Text waits while its bytes end inside a character of UTF-8; bytes that cannot become one come
    out as U+FFFD, as `decode` has it. Specials read as `decode` has them: SentencePiece's and the
    byte tokenizer's as nothing, Llama 3's as their names, so stop before feeding an end token.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """`before`: ids that the text goes on from. Only after none does it begin."""
        self._tokenizer = tokenizer
        self._start()
        self._before = list(before[-1:])

    def feed(self, token: int) -> str:
        """The text that this id completes, "" while a character is unfinished."""
        raw = self._tokenizer.token_bytes(token)
        if not raw and not self._waiting:  # inside a character it matters: it may break that off
            return ""
        self._waiting.append(token)
        self._utf8.decode(raw)
        unfinished, _ = self._utf8.getstate()
        return "" if unfinished else self._take()

    def finish(self) -> str:
        """The text that still waits, an unfinished character as U+FFFD; then a new text begins."""
        text = self._take()
        self._start()
        return text

    def _start(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[int] = []  # the last id given: SentencePiece drops a text's first space
        self._waiting: list[int] = []

    def _take(self) -> str:
        decode = self._tokenizer.decode
        text = decode(self._before + self._waiting)[len(decode(self._before)) :]
        self._before, self._waiting = (self._waiting or self._before)[-1:], []
        return text
