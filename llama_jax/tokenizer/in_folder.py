"""The tokenizer in a folder of a model: its file, and the tokens that the checkpoint adds to it.

A converted model's folder has the additions in its model.json; the workdir of a run and a folder of rows have
them in tokenizer_additions.json, where there are any.
"""

import dataclasses
import json
import os
import re
from typing import Any

from llama_jax import config
from llama_jax.tokenizer.added import NONE, Additions
from llama_jax.tokenizer.special import AddedToken

FILE, ADDITIONS = "tokenizer.model", "tokenizer_additions.json"
MODEL, OF_MODEL = "model.json", "tokenizer_additions"  # the file and its entry with the additions
_OURS = (MODEL, "run.json", "meta.json")  # one of them marks a converted model, a run, token rows


def read(folder: str) -> tuple[config.TokenizerConfig, Additions]:
    """The tokenizer that a folder holds. ValueError if it holds none, or one that cannot be read."""
    folder = os.path.abspath(os.path.expanduser(folder))
    file = os.path.join(folder, FILE)
    if not any(os.path.isfile(os.path.join(folder, name)) for name in _OURS):
        raise ValueError(
            f"data.tokenizer.path={folder!r} must be a folder that experiments.convert wrote, or the workdir "
            "of a run"
        )
    if not os.path.isfile(file):
        raise ValueError(
            f"data.tokenizer.path={folder!r} holds no {FILE}; if its model has the byte tokenizer, set "
            "data.tokenizer.kind='byte'"
        )
    with open(file, "rb") as opened:
        kind = kind_of(opened.read(_BEGINNING_BYTES))
    return config.TokenizerConfig(kind, file), additions(folder)


_BEGINNING_BYTES = 1 << 12


def additions(folder: str) -> Additions:
    """What a checkpoint adds to the tokenizer in a folder. ValueError names a file that cannot be read."""
    for name, of in ((MODEL, lambda said: said.get(OF_MODEL)), (ADDITIONS, lambda said: said)):
        file = os.path.join(folder, name)
        if os.path.isfile(file):
            try:
                with open(file, encoding="utf-8") as opened:
                    said = of(json.load(opened))
                return NONE if said is None else of_dict(said)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"{file} cannot be read ({error})") from error
    return NONE


def to_dict(additions: Additions) -> dict[str, Any]:
    """The inverse of `of_dict`, for JSON."""
    return dataclasses.asdict(additions)


def of_dict(said: dict[str, Any]) -> Additions:
    """ValueError, TypeError or KeyError if they are none."""
    rest = {name: value for name, value in said.items() if name != "tokens"}
    return Additions(tuple(AddedToken(**token) for token in said["tokens"]), **rest)


def kind_of(beginning: bytes) -> str:
    """Of a tokenizer's file: ranks are lines of text, tokenizer.json is JSON, SentencePiece is neither."""
    if beginning[:1] == b"{":
        return "json"
    return "bpe" if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", beginning) else "sp"
