"""A trained network, its tokenizer and what it was trained for, ready to go on with texts."""

import dataclasses
import datetime
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llama_jax import config, sharding
from llama_jax.convert import carried, formats, native
from llama_jax.decode.engine import Engine
from llama_jax.decode.speculative import Speculative
from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer
from llama_jax.tokenizer import base, forms
from llama_jax.tokenizer.base import Tokenizer


class LoadedModel(NamedTuple):
    """A network that can go on with texts."""

    engine: Engine | Speculative
    params: Any  # as the engine takes them
    tokenizer: Tokenizer
    context: int  # positions it was trained for
    ends: frozenset[int]  # tokens that end a text
    folder: Path
    identity: str  # of the weights: the same wherever the folder is moved to
    draft: str = ""  # the identity of the network that proposes, and how far it is ahead


def load(folder: Path, decode: config.Decode, mesh: config.Mesh, step: int = 0) -> LoadedModel:
    """step: as in native.load. ValueError if the folder has no network or no tokenizer."""
    folder = folder.expanduser().absolute()
    model, context, tokenizer = settings(folder)
    if decode.compute_dtype != "stored":
        model = dataclasses.replace(model, compute_dtype=decode.compute_dtype)
    module = transformer.build(model, sharding.make(mesh, jax.devices()))
    step = step or newest(folder)
    engine, params = Engine(module, decode), decode_params(folder, module, step)
    ends, known = (
        end_tokens(folder, tokenizer, decode.stop_tokens),
        identity(folder, model, tokenizer, step),
    )
    return LoadedModel(engine, params, tokenizer, context, ends, folder, known)


def newest(folder: Path) -> int:
    """The step whose parameters are loaded, 0 of a converted model. ValueError if the folder has none."""
    formats.check_native(folder)
    return native.newest(folder)


def decode_params(folder: Path, module: Transformer, step: int = 0) -> Any:
    """The parameters of a folder as an Engine takes them, read in the compute dtype.

    At most they and one stacked array are in memory: float32 copies would be twice as much.
    """
    params = native.load(folder, module, module.config.compute_dtype, step=step)
    return transformer.unstack_and_delete(module, params)


def end_tokens(folder: Path, tokenizer: Tokenizer, named: Sequence[str]) -> frozenset[int]:
    """The tokenizer's end and what the checkpoint names as ends, Llama 3's ends of a turn, those `named`.

    Where a checkpoint names none, bos is one, too: llama2.c's stories begin the next text, and end none.
    """
    marks = (f"<|{name}|>" for name in ("eot_id", "eom_id"))
    turns = {tokenizer.special[name] for name in marks if name in tokenizer.special}
    own = carried.end_ids(folder) or {tokenizer.bos}
    asked = {config.choose(tokenizer.special, name, "decode.stop_tokens") for name in named}
    return frozenset({tokenizer.eos} | own | turns | asked)


def identity(folder: Path, model: config.Model, tokenizer: Tokenizer, step: int) -> str:
    """A text that other weights, settings or another tokenizer do not have."""
    of_tokens = [tokenizer.fingerprint, base.named(tokenizer)]
    said = [native.identity(folder, step), config.to_dict(model), *of_tokens]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def form_of(loaded: LoadedModel, date: datetime.date | None) -> forms.Form:
    """How the model takes conversations. date: what it is told of the day; today where it asks for that."""
    tokenizer = loaded.tokenizer
    names = {i: name for name, i in tokenizer.special.items()}
    own = {"bos_token": names.get(tokenizer.bos, ""), "eos_token": names.get(tokenizer.eos, "")}
    return forms.find(
        carried.chat_template(loaded.folder),
        own | carried.token_names(loaded.folder),
        tokenizer,
        datetime.date.today(),
        date,
    )


def settings(folder: Path) -> tuple[config.Model, int, Tokenizer]:
    """Of a folder: its network's, the positions it was trained for, its tokenizer. ValueError without."""
    formats.check_native(folder)
    model, context, file = native.settings(folder)
    if file is None:
        raise ValueError(
            f"{folder} has no tokenizer that is read here: convert it again, with --tokenizer=FILE or, where "
            "it came with a tokenizer.json, after pip install 'llama_jax[tokenizers]'"
        )
    tokenizer = file.load()
    formats.check_ids(tokenizer, model)
    return model, context, tokenizer


def with_draft(target: LoadedModel, draft: LoadedModel, proposals: int) -> LoadedModel:
    if target.tokenizer.fingerprint != draft.tokenizer.fingerprint:
        raise ValueError(
            f"--draft={draft.folder} has another tokenizer than {target.folder}: its proposals mean nothing"
        )
    assert isinstance(target.engine, Engine)
    assert isinstance(draft.engine, Engine)
    engine = Speculative(target.engine, draft.engine, proposals)
    return target._replace(
        engine=engine,
        params=(target.params, draft.params),
        context=min(target.context, draft.context),
        draft=f"{draft.identity} {proposals}",
    )


def prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as the network is given it; bos for an empty one, where texts begin without."""
    return [*tokenizer.prefix, *tokenizer.encode(text)] or [tokenizer.bos]


def fit(prompt: int, new: int, context: int, what: str) -> None:
    """ValueError if a prompt and its continuation do not fit into what the model was trained for."""
    if prompt + new <= context:
        return
    if prompt < context:
        way = f"try --config.decode.max_new_tokens={context - prompt}"
    elif new < context:
        way = f"shorten it to at most {context - new} tokens"
    else:
        way = "shorten it, and lower decode.max_new_tokens"
    raise ValueError(
        f"{what} has {prompt} tokens and decode.max_new_tokens={new} more make {prompt + new}, beyond "
        f"the {context} that the model was trained for; {way}"
    )


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
