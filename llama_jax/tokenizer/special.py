"""Tokens that a text holds by name: special ones where they are asked for, added ones in any text."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token with a name; the flags are those of `tokenizers.AddedToken`.

    One that is not `special` is found in any text. lstrip, rstrip: the white space before or behind the name
    belongs to it. single_word: the name counts only where no letter or digit touches it. normalized: the name
    is looked for in the normalised text, in which SentencePiece's space stands before it.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    def __post_init__(self):
        if type(self.id) is not int or self.id < 0 or not self.content:
            raise ValueError(
                f"added token {self.content!r}: its id {self.id!r} must be 0 or more, its name not empty"
            )
        if not isinstance(self.content, str):
            raise ValueError(f"added token {self.id}: its name {self.content!r} must be a text")


class Part(NamedTuple):
    """A token that a name stands for, or a text (token -1) without such names."""

    text: str
    token: int
    start: int  # its place in the whole text


class Names:
    """Finds names in texts, from the left, the longest first. before: a pattern that must precede them."""

    def __init__(self, tokens: Iterable[AddedToken], before: str = ""):
        self._tokens = sorted(tokens, key=lambda token: len(token.content), reverse=True)
        self._pattern = re.compile(
            "|".join(f"{before}{_pattern(token)}" for token in self._tokens) or "(?!)"
        )

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def split(self, text: str) -> Iterator[Part]:
        at = 0
        for found in self._pattern.finditer(text):
            if at < found.start():
                yield Part(text[at : found.start()], -1, at)
            yield Part(found[0], self._tokens[(found.lastindex or 0) - 1].id, found.start())
            at = found.end()
        if at < len(text):
            yield Part(text[at:], -1, at)


def _pattern(token: AddedToken) -> str:
    edge = r"(?!\w)" if token.single_word else ""
    name = ("(?<!\\w)" if edge else "") + f"({re.escape(token.content)})" + edge
    return (r"\s*" if token.lstrip else "") + name + (r"\s*" if token.rstrip else "")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in which the tokenizer's special names stand for their tokens.

    What stands between two names is encoded as a text of its own: SentencePiece puts its space
    before it again, as Meta's code does with every turn of a dialogue.
    """
    special = tokenizer.special.items()
    names = Names(AddedToken(i, name) for name, i in special if i not in tokenizer.user_defined)
    ids = []
    for part in names.split(text):
        ids += tokenizer.encode(part.text) if part.token < 0 else [part.token]
    return ids
