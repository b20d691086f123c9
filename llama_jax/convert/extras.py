"""The small files that stand beside the weights, settings and tokenizer, as each format has them."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from llama_jax.convert import hf as hugging_face
from llama_jax.convert import meta_params
from llama_jax.convert import native as our
from llama_jax.convert.source import CheckpointSource, TokenizerFile
from llama_jax.tokenizer.added import NONE
from llama_jax.tokenizer.hf import hf_files

Report = Callable[[str], object]
Files = dict[str, bytes]  # by their names in the folder
Extras = Callable[[CheckpointSource, dict[str, np.dtype], Report], Files]


def native(source: CheckpointSource, dtypes: dict[str, np.dtype], report: Report) -> Files:
    origin = {"format": source.format, "files": [file.name for file in source.files[:8]]}
    said = our.description(source.model, source.context, source.tokenizer, origin)
    carried = {f"{our.CARRIED}/{name}": text for name, text in source.carried.items()}
    return {our.MODEL: _json(said), **_own(source.tokenizer), **carried}


def hf(source: CheckpointSource, dtypes: dict[str, np.dtype], report: Report) -> Files:
    tokenizer, ids = source.tokenizer, _special_ids(source)
    widest = max(dtypes.values(), key=lambda dtype: dtype.itemsize)
    settings = hugging_face.settings_of(source.model, source.context, widest, ids)
    # Its tokenizer's own files leave as they came, also one of which Hugging Face's form cannot be made.
    came = {"tokenizer.json", our.TOKENIZER} & source.carried.keys()
    made = {}
    if tokenizer and _own(tokenizer) and not came:
        made = hf_files(tokenizer.kind, tokenizer.content, tokenizer.additions)
    generation = {"generation_config.json": _json({"_from_model_config": True, **ids})}
    return {**generation, **made, **source.carried, "config.json": _json(settings)}


def meta(source: CheckpointSource, dtypes: dict[str, np.dtype], report: Report) -> Files:
    """What Meta's format has no place for is reported."""
    tokenizer, own = source.tokenizer, _own(source.tokenizer)
    if tokenizer and tokenizer.kind == "json":
        report("Meta's format has no place for a tokenizer.json: the tokenizer is left out")
        own = {}
    elif tokenizer and (names := _added_names(tokenizer)):
        report(
            f"Meta's format has no place for {len(names)} tokens that the checkpoint adds to its "
            f"tokenizer's file: {', '.join(names[:4])}{', ...' if names[4:] else ''}"
        )
    told = meta_params.context_of(meta_params.params_of(source.model))
    if told != source.context:
        report(
            f"Meta's params.json has no word for the {source.context} positions of this model: "
            f"its other settings are those of models with {told}"
        )
    return own


def _own(tokenizer: TokenizerFile | None) -> Files:
    """The tokenizer's file; the byte tokenizer has none."""
    return {our.TOKENIZER: tokenizer.content} if tokenizer and tokenizer.content else {}


def _added_names(tokenizer: TokenizerFile) -> list[str]:
    """Of the tokens that the tokenizer's own file does not have."""
    own = dataclasses.replace(tokenizer, additions=NONE).load().special
    return [t.content for t in tokenizer.additions.tokens if own.get(t.content) != t.id]


def _special_ids(source: CheckpointSource) -> dict[str, Any]:
    """Begin, end and padding, as the checkpoint came with them, else the tokenizer's."""
    ids: dict[str, Any] = {}
    if source.tokenizer is not None:
        tokenizer = source.tokenizer.load()
        # Llama 3's chat models end a turn otherwise than a text, and transformers stops at these ids alone.
        named = (f"<|{name}|>" for name in ("eot_id", "eom_id"))
        turns = {tokenizer.special[name] for name in named if name in tokenizer.special}
        ends = sorted({tokenizer.eos} | turns)
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": ends if turns else tokenizer.eos}
    for said in (_object(source, "config.json"), _object(source, "generation_config.json")):
        ids |= {name: said[name] for name in _IDS if said.get(name) is not None}
    return ids


def _object(source: CheckpointSource, name: str) -> dict[str, Any]:
    """A JSON file that came with the checkpoint; empty if none did."""
    try:
        value = json.loads(source.carried.get(name, b"{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{name} of {source.files[0].parent} is not a JSON object; mend it or take it away"
        )
    return value


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
