"""One token a byte of UTF-8, for small experiments: no training, no file, no unknown words."""

from collections.abc import Sequence

import numpy as np


class Byte:
    """Ids 0..255 are bytes; 256 begins a document, 257 ends it, 258 pads."""

    vocab_size = 259
    bos, eos, pad = 256, 257, 258
    fingerprint = "byte-259"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")
