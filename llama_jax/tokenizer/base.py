"""What a tokenizer is, and how to load the one that a run names."""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llama_jax import config
from llama_jax.tokenizer import bpe, byte, hf_json, in_folder, sp
from llama_jax.tokenizer.added import NONE, Additions, Extended


class Tokenizer(Protocol):
    """Text to ids and back. A lone surrogate in a text is a ValueError.

    A network may have more ids than its tokenizer: those without a token decode to nothing.
    """

    vocab_size: int
    bos: int
    eos: int
    pad: int
    prefix: tuple[int, ...]  # what a text given to the network begins with: (bos,), or nothing
    fingerprint: str  # two tokenizers with one fingerprint give texts the same ids
    special: dict[str, int]  # name -> id: tokens that have a name, special ones and added ones
    user_defined: frozenset[int]  # those of `special` that ordinary text becomes, too

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of the text. Names of special tokens are text too, unless `special` asks for them:
        then what stands between them is encoded as texts of their own."""
        ...

    def encode_inner(self, text: str) -> list[int]:
        """Ids of a text that goes on from another: without the space that SentencePiece puts first."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """int32 ids of each text, the same as `encode` gives without specials."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def id_of(self, name: str) -> int:
        """The id of the token that Hugging Face's vocabulary lists under this name, -1 without one."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What an id adds to the UTF-8 of a text; half a character, maybe, or nothing."""
        ...


def byte_counts(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of UTF-8 that each id adds to a text, [2, V]: inside it, and as its first token.

    Special tokens are no text, user-defined ones are. SentencePiece puts a space before a text, which
    is not the text's own.
    """
    special = set(tokenizer.special.values()) - tokenizer.user_defined
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


def named(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the fingerprint leaves out: begin, end and padding, what a prompt begins with, tokens by name."""
    ends = {name: getattr(tokenizer, name) for name in ("bos", "eos", "pad")}
    return {**ends, "prefix": list(tokenizer.prefix), "special": tokenizer.special}


def load(tokenizer: config.TokenizerConfig, additions: Additions = NONE) -> Tokenizer:
    """The tokenizer that the config names, with what a checkpoint adds to it.

    Kind "folder" has its own additions. ValueError on a file that is missing or is not one.
    """
    if tokenizer.kind == "folder":
        tokenizer, additions = in_folder.read(tokenizer.path)
    elif os.path.isdir(os.path.expanduser(tokenizer.path)) and tokenizer.path:
        raise ValueError(
            f"data.tokenizer.path={tokenizer.path!r} is a folder; set data.tokenizer.kind='folder' for the "
            "tokenizer of the model in it, or name a file"
        )
    own = config.choose(KINDS, tokenizer.kind, "data.tokenizer.kind")(tokenizer.path)
    return own if additions == NONE else Extended(own, additions)


KINDS = {"byte": lambda path: byte.Byte(), "sp": sp.load, "bpe": bpe.load, "json": hf_json.load}
