"""What a tokenizer is, and how to load the one that a run names."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llama_jax import config
from llama_jax.tokenizer import bpe, byte, sp


class Tokenizer(Protocol):
    """Text to ids and back. A lone surrogate in a text is a ValueError."""

    vocab_size: int
    bos: int
    eos: int
    pad: int
    fingerprint: str  # two tokenizers with one fingerprint give the same ids
    special: dict[str, int]  # name -> id of the tokens that no ordinary text becomes

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of the text. Names of special tokens are text too, unless `special` asks for them:
        then what stands between them is encoded as texts of their own."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """int32 ids of each text, the same as `encode` gives without specials."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the UTF-8 of a text; half a character, maybe."""
        ...


def byte_counts(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of UTF-8 that each id adds to a text, [2, V]: inside it, and as its first token.

    Special tokens are no text. SentencePiece puts a space before a text, which is not the text's own.
    """
    special = set(tokenizer.special.values())
    counts_2V = np.zeros((2, tokenizer.vocab_size), np.int64)
    for token in range(tokenizer.vocab_size):
        if token in special:
            continue
        raw = tokenizer.token_bytes(token)
        counts_2V[:, token] = len(raw)
        if raw.startswith(b" "):
            text = tokenizer.decode([token])
            dropped = len(raw) - len(raw.lstrip(b" ")) - (len(text) - len(text.lstrip(" ")))
            counts_2V[1, token] -= dropped
    return counts_2V


def load(tokenizer: config.Tokenizer) -> Tokenizer:
    """The tokenizer that the config names; ValueError on a file that is missing or is not one."""
    return config.choose(KINDS, tokenizer.kind, "data.tokenizer.kind")(tokenizer.path)


KINDS = {"byte": lambda path: byte.Byte(), "sp": sp.load, "bpe": bpe.load}
