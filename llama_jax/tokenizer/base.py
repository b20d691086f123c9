"""What a tokenizer is, and how to load the one that a run names."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llama_jax import config
from llama_jax.tokenizer import bpe, byte, sp


class Tokenizer(Protocol):
    """Text to ids and back. `encode` never gives a special token, whatever the text spells."""

    vocab_size: int
    bos: int
    eos: int
    pad: int
    fingerprint: str  # two tokenizers with one fingerprint give the same ids

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """int32 ids of each text, the same as `encode` gives."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


def load(tokenizer: config.Tokenizer) -> Tokenizer:
    """The tokenizer that the config names; ValueError on a file that is missing or is not one."""
    return config.choose(KINDS, tokenizer.kind, "data.tokenizer.kind")(tokenizer.path)


KINDS = {"byte": lambda path: byte.Byte(), "sp": sp.load, "bpe": bpe.load}
