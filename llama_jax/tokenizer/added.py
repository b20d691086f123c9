"""What a checkpoint says of its tokenizer beyond the model file: tokens that it adds, other names, other ids.

A fine-tune extends the vocabulary (`<|im_end|>` = 32001 on Llama 2), or renames what was reserved. Hugging
Face's folders say so in added_tokens.json, tokenizer_config.json (`added_tokens_decoder`) and tokenizer.json
(`added_tokens`). Where names are found in a text is what its `tokenizers` does (AddedVocabulary).
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from llama_jax import config
from llama_jax.tokenizer import surrogate
from llama_jax.tokenizer.special import AddedToken, Names


@dataclasses.dataclass(frozen=True)
class Additions:
    """Added and renamed tokens; bos, eos and pad where they are not the model file's (-1: they are).

    adds_bos: texts that the network is given begin with bos. spaces: SentencePiece's space stands before
    "every" text between added tokens, or before the "first" alone, where the whole begins with it.
    """

    tokens: tuple[AddedToken, ...] = ()
    bos: int = -1
    eos: int = -1
    pad: int = -1
    adds_bos: bool = True
    spaces: str = "every"

    def __post_init__(self):
        config.choose(("every", "first"), self.spaces, "spaces")


NONE = Additions()


class Extended:
    """A tokenizer with additions.

    An added special token reads as the file's own do: as nothing in SentencePiece, as its name in Llama 3.
    The others read as their names.
    """

    def __init__(self, base: Any, additions: Additions):
        """base: the Tokenizer of the model file."""
        added = [
            token
            for token in additions.tokens
            if base.special.get(token.content) != token.id or token.id in base.user_defined
        ]
        taken = {token.id for token in added}
        found = [token for token in added if not token.special]  # in any text
        own = {name: i for name, i in base.special.items() if i not in taken}
        self._base, self._first_alone = base, additions.spaces == "first"
        self.special = own | {token.content: token.id for token in added}
        self.user_defined = (base.user_defined - taken) | {token.id for token in found}
        self.vocab_size = max([base.vocab_size, *(i + 1 for i in taken)])
        self.bos = base.bos if additions.bos < 0 else additions.bos
        self.eos = base.eos if additions.eos < 0 else additions.eos
        self.pad = base.pad if additions.pad < 0 else additions.pad
        self.prefix = (self.bos,) if additions.adds_bos else ()
        self.fingerprint = _fingerprint(base.fingerprint, found, additions.spaces)
        silent = base.decode([base.bos]) == ""
        self._shown = {t.id: "" if t.special and silent else t.content for t in added}
        # An id behind which a text goes on: SentencePiece drops the first space of one that begins.
        self._anchor = (base.encode("\n") or base.encode("a"))[-1:]
        # Hugging Face's normaliser of SentencePiece puts the space before each text between names.
        normal = [] if self._first_alone else [token for token in found if token.normalized]
        spaced = base.encode("a") != base.encode_inner("a")
        self._normal = Names(normal, "(?:^| )" if spaced else "")
        raw = [token for token in found if token not in normal]
        specials = [AddedToken(i, name) for name, i in own.items() if i not in base.user_defined]
        self._raw = Names(raw)
        self._named = Names([*specials, *(token for token in added if token not in normal)])

    def encode(self, text: str, special: bool = False) -> list[int]:
        surrogate.refuse(text)
        return self._ids(text, self._named if special else self._raw, begins=True)

    def encode_inner(self, text: str) -> list[int]:
        surrogate.refuse(text)
        return self._ids(text, self._raw, begins=False)

    def _ids(self, text: str, names: Names, begins: bool) -> list[int]:
        ids = []
        for part in names.split(text):
            if part.token >= 0:
                ids.append(part.token)
                continue
            spaced = begins if part.start == 0 else not self._first_alone
            for inner in self._normal.split(part.text):
                if inner.token >= 0:
                    ids.append(inner.token)
                elif spaced and inner.start == 0:
                    ids += self._base.encode(inner.text)
                else:
                    ids += self._base.encode_inner(inner.text)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        if not self._raw and not self._normal:
            return self._base.encode_batch(texts, threads)
        with futures.ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: np.array(self.encode(text), np.int32), texts))

    def decode(self, ids: Sequence[int]) -> str:
        text, run = "", []
        for i in map(int, ids):
            shown = self._shown.get(i)
            if shown is None:
                run.append(i)
            elif shown:
                text += self._go_on(text, run) + shown
                run = []
        return text + self._go_on(text, run)

    def _go_on(self, text: str, run: list[int]) -> str:
        """What ids read as behind a text."""
        if not text or not run:
            return self._base.decode(run)
        decode, anchor = self._base.decode, self._anchor
        return decode([*anchor, *run])[len(decode(anchor)) :]

    def id_of(self, name: str) -> int:
        return self.special.get(name, self._base.id_of(name))

    def token_bytes(self, token: int) -> bytes:
        shown = self._shown.get(int(token))
        return self._base.token_bytes(token) if shown is None else shown.encode()


def _fingerprint(base: str, found: Sequence[AddedToken], spaces: str) -> str:
    """The file's own unless ordinary texts have other ids."""
    if not found:
        return base
    flags = sorted(dataclasses.astuple(token) for token in found)
    return hashlib.sha256(repr([base, flags, spaces]).encode()).hexdigest()
