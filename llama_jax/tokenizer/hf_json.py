"""Any tokenizer.json of Hugging Face, by their `tokenizers` library: `pip install llama_jax[tokenizers]`.

For derivatives whose tokenizer is neither a SentencePiece model nor Llama 3's ranks: GPT-2-like byte-level
BPE (SmolLM2, Falcon3, DeepSeek), or a Llama 2 whose tokenizer.json is all that came.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_jax.tokenizer import surrogate
from llama_jax.tokenizer.alphabet import BYTES

# How such files name begin and end, where no tokenizer_config.json says it.
_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
_ENDS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Json:
    """Special tokens read as nothing. bos and eos are -1 where the file does not tell them."""

    def __init__(self, content: bytes):
        import tokenizers

        self._document = json.loads(content)
        self._text = tokenizers.Tokenizer.from_buffer(content)  # names of specials are text
        self._named = tokenizers.Tokenizer.from_buffer(content)
        for tokenizer in (self._text, self._named):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._text.encode_special_tokens = True
        added = self._text.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items()}
        self.user_defined = frozenset(i for i, token in added.items() if not token.special)
        self.vocab_size = max(self._text.get_vocab(True).values(), default=-1) + 1
        begins = self._named.encode("").ids
        named = [self.special[name] for name in _BEGINS if name in self.special]
        self.bos = [*begins, *named, -1][0]
        self.eos = [*(self.special[name] for name in _ENDS if name in self.special), -1][0]
        self.bos = self.bos if self.bos >= 0 else self.eos
        self.pad = self.eos
        self.prefix = tuple(begins[:1])
        self.fingerprint = hashlib.sha256(content).hexdigest()
        decoder = json.dumps(self._document.get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        self._byte_fallback = '"ByteFallback"' in decoder
        self._strips = '"Strip"' in decoder or '"Metaspace"' in decoder

    def encode(self, text: str, special: bool = False) -> list[int]:
        surrogate.refuse(text)
        tokenizer = self._named if special else self._text
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_inner(self, text: str) -> list[int]:
        surrogate.refuse(text)
        return self._inner.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _inner(self):
        """Without the space that it puts before a text."""
        import tokenizers

        document = json.dumps({**self._document, "padding": None, "truncation": None})
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_unspaced(json.loads(document))))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """The library chooses how many threads."""
        for text in texts:
            surrogate.refuse(text)
        encoded = self._text.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        if not self._byte_fallback:
            return self._text.decode([int(i) for i in ids], skip_special_tokens=True)
        # The library gives up a whole run of bytes for one that is wrong, and so for a character to come.
        text = b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        return text.removeprefix(" ") if self._strips else text

    def id_of(self, name: str) -> int:
        found = self._text.token_to_id(name)
        return -1 if found is None else found

    def token_bytes(self, token: int) -> bytes:
        piece = self._text.id_to_token(int(token))
        if piece is None:
            return b""
        if piece in self.special:
            return piece.encode() if self.special[piece] in self.user_defined else b""
        if self._byte_level:
            return b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()


def _unspaced(part: Any) -> Any:
    """A description of a tokenizer without what puts a space before a text."""
    if isinstance(part, list):
        return [
            _unspaced(one)
            for one in part
            if not (type(one) is dict and one.get("type") == "Prepend")
        ]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    part = {name: value if name == "vocab" else _unspaced(value) for name, value in part.items()}
    if part.get("type") == "Metaspace":
        part = {k: v for k, v in part.items() if k != "add_prefix_space"} | {
            "prepend_scheme": "never"
        }
    return part | {"add_prefix_space": False} if part.get("type") == "ByteLevel" else part


def load(path: str) -> Json:
    """ValueError names a file that is missing or something else, and the library where it is absent."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(
            f"data.tokenizer.path={path!r} cannot be read: {error.strerror}; name a tokenizer.json"
        ) from error
    try:
        return Json(content)
    except ImportError as error:
        raise ValueError(
            f"data.tokenizer.path={path!r} is a tokenizer.json that the `tokenizers` library reads, which is "
            "not installed: pip install 'llama_jax[tokenizers]'"
        ) from error
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(
            f"data.tokenizer.path={path!r} is not a tokenizer.json that `tokenizers` reads: {error}"
        ) from error
