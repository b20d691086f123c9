"""Byte-pair encoding from tiktoken ranks: the tokenizer of Llama 3, 3.1 and 3.2.

Ranks are lines `base64 rank`. Pre-tokenising expression, special tokens and the limits on what is
encoded at once are those of Meta's llama-models, models/llama3 (tokenizer.py). Hugging Face calls
id 128005 otherwise, which shifts the later reserved names: hf.SPECIALS has theirs.
"""

import base64
import binascii
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from concurrent import futures

import numpy as np

from llama_jax.tokenizer import special as names
from llama_jax.tokenizer import surrogate
from llama_jax.tokenizer.alphabet import BYTES

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
SPECIALS = (*NAMED, *(f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(NAMED))))

# tiktoken's expression engine fails on longer inputs, and its merging is quadratic in a word.
MAX_CHARS = 400_000
MAX_RUN = 25_000
# Runs of one kind, tried at their start only, so that the search stays linear.
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1},}}|(?<!\s)\s{{{MAX_RUN + 1},}}")


class Bpe:
    """Ids 0..ranks-1 are merges of bytes; the 256 special tokens follow."""

    def __init__(self, ranks: dict[bytes, int], fingerprint: str):
        import tiktoken

        self.special = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.vocab_size = len(ranks) + len(SPECIALS)
        self.bos = self.special["<|begin_of_text|>"]
        self.eos = self.special["<|end_of_text|>"]
        self.pad = self.special["<|finetune_right_pad_id|>"]
        self.prefix, self.user_defined = (self.bos,), frozenset()
        self.fingerprint = fingerprint

    def encode(self, text: str, special: bool = False) -> list[int]:
        surrogate.refuse(text)
        if special:
            return names.encode(self, text)
        parts = map(self._encoding.encode_ordinary, _parts(text))
        return list(itertools.chain.from_iterable(parts))

    def encode_inner(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        with futures.ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._array, texts))

    def _array(self, text: str) -> np.ndarray:
        surrogate.refuse(text)
        encode = self._encoding.encode_to_numpy  # no list of Python numbers
        parts = [encode(part, disallowed_special=()) for part in _parts(text)]
        return np.concatenate([np.empty(0, np.uint32), *parts]).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(i) for i in ids if i < self.vocab_size])

    def id_of(self, name: str) -> int:
        if name in self.special:
            return self.special[name]
        try:
            return self._encoding.encode_single_token(bytes(BYTES[char] for char in name))
        except KeyError:  # no character of the alphabet, or no token
            return -1

    def token_bytes(self, token: int) -> bytes:
        if token >= self.vocab_size:
            return b""
        return self._encoding.decode_single_token_bytes(int(token))


def load(path: str) -> Bpe:
    """The ranks in a file. ValueError on a file that is missing, and on the first wrong line."""
    try:
        with open(os.path.expanduser(path), "rb") as f:
            content = f.read()
    except OSError as error:
        raise ValueError(
            f"data.tokenizer.path={path!r} cannot be read: {error.strerror}; name tiktoken ranks"
        ) from error
    ranks = parse(content, f"data.tokenizer.path={path!r}")
    return Bpe(ranks, hashlib.sha256(content).hexdigest())


def parse(content: bytes, source: str) -> dict[bytes, int]:
    """Bytes of a token -> rank, from lines `base64 rank`; ValueError names source and line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split(b" ")
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{source} line {number + 1}: {line[:40]!r} is not "
                "`base64 rank`, as tiktoken's files have it; a SentencePiece model needs "
                "data.tokenizer.kind='sp'"
            ) from error
        if rank != number or token in ranks:
            raise ValueError(
                f"{source} line {number + 1}: rank {rank} of {token!r} must be "
                f"{number} and its bytes new; the file is damaged: fetch it again"
            )
        ranks[token] = rank
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise ValueError(
            f"{source} ({len(ranks)} ranks) lacks byte {missing[0]}: every "
            "byte must have a rank; the file is damaged or truncated: fetch it again"
        )
    return ranks


def _parts(text: str) -> list[str]:
    """The text in parts of at most MAX_CHARS, no run of spaces or of others beyond MAX_RUN."""
    parts = []
    for start in range(0, len(text), MAX_CHARS):
        block = text[start : start + MAX_CHARS]
        cuts = [0]
        for run in _LONG_RUN.finditer(block) if _uniform(block) else ():
            cuts += range(run.start() + MAX_RUN, run.end(), MAX_RUN)
        parts += [block[a:b] for a, b in zip(cuts, [*cuts[1:], len(block)], strict=True)]
    return parts


def _uniform(block: str) -> bool:
    """Whether spaces or others fill a half of MAX_RUN from a multiple of it, as a longer run does.

    The search for runs itself takes as long as encoding.
    """
    half = MAX_RUN // 2
    windows = (block[at : at + half] for at in range(0, len(block) - half + 1, half))
    return any(window.isspace() or len(window.split(None, 1)[0]) == half for window in windows)
