"""A trained network, its tokenizer and what it was trained for, ready to go on with texts."""

import sys
from pathlib import Path
from typing import NamedTuple

import jax

from llama_jax import config, sharding
from llama_jax.convert import formats, native
from llama_jax.decode.engine import Engine
from llama_jax.decode.speculative import Speculative
from llama_jax.model import transformer
from llama_jax.tokenizer.base import Tokenizer


class Loaded(NamedTuple):
    """A network that can go on with texts."""

    engine: Engine | Speculative
    tokenizer: Tokenizer
    context: int  # positions it was trained for
    ends: frozenset[int]  # tokens that end a text
    folder: Path
    draft: str = ""  # the folder of the network that proposes, and how far it is ahead


def load(folder: Path, decode: config.Decode, mesh: config.Mesh) -> Loaded:
    """ValueError if the folder has no network or no tokenizer."""
    folder = folder.expanduser().absolute()
    model, context, tokenizer = settings(folder)
    module = transformer.build(model, sharding.make(mesh, jax.devices()))
    turns = {tokenizer.special.get(f"<|{name}|>") for name in ("eot_id", "eom_id")} - {None}
    named = {
        config.choose(tokenizer.special, name, "decode.stop_tokens") for name in decode.stop_tokens
    }
    ends = frozenset({tokenizer.bos, tokenizer.eos} | turns | named)
    return Loaded(
        Engine(module, native.load(folder, module), decode), tokenizer, context, ends, folder
    )


def settings(folder: Path) -> tuple[config.Model, int, Tokenizer]:
    """Of a folder: its network's, the positions it was trained for, its tokenizer. ValueError without."""
    model, context, file = native.settings(folder)
    if file is None:
        raise ValueError(f"{folder} has no tokenizer: convert it again with --tokenizer=FILE")
    tokenizer = formats.loaded(file)
    formats.check_ids(tokenizer, model)
    return model, context, tokenizer


def with_draft(target: Loaded, draft: Loaded, proposals: int) -> Loaded:
    if target.tokenizer.fingerprint != draft.tokenizer.fingerprint:
        raise ValueError(
            f"--draft={draft.folder} has another tokenizer than {target.folder}: its proposals mean nothing"
        )
    engine = Speculative(target.engine, draft.engine, proposals)
    context = min(target.context, draft.context)
    return target._replace(engine=engine, context=context, draft=f"{draft.folder} {proposals}")


def fit(prompt: int, new: int, context: int, what: str) -> None:
    """ValueError if a prompt and its continuation do not fit into what the model was trained for."""
    if prompt + new > context:
        raise ValueError(
            f"{what} has {prompt} tokens and decode.max_new_tokens={new} more make {prompt + new}, beyond "
            f"the {context} that the model was trained for; "
            + (
                f"try --config.decode.max_new_tokens={context - prompt}"
                if prompt < context
                else f"shorten it to at most {context - 1}"
            )
        )


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
