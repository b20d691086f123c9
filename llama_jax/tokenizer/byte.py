"""One token a byte of UTF-8, for small experiments: no training, no file, no unknown words."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from llama_jax.tokenizer import special as names
from llama_jax.tokenizer import surrogate


class Byte:
    """Ids 0..255 are bytes; 256 begins a document, 257 ends it, 258 pads."""

    vocab_size = 259
    bos, eos, pad = 256, 257, 258
    fingerprint = "byte-259"
    special: ClassVar = {"<bos>": bos, "<eos>": eos, "<pad>": pad}
    prefix, user_defined = (bos,), frozenset()

    def encode(self, text: str, special: bool = False) -> list[int]:
        surrogate.refuse(text)
        return names.encode(self, text) if special else list(text.encode())

    def encode_inner(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        for text in texts:
            surrogate.refuse(text)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def id_of(self, name: str) -> int:
        return self.special.get(name, -1)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token] if token < 256 else [])
