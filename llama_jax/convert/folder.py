"""The destination of a conversion: prepared beside its final name, completed, renamed at the very end."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import config
from llama_jax.convert import formats, hf, job, meta_params, native, stage, targets
from llama_jax.convert.source import Source, Tokenizer, compute_dtype
from llama_jax.tokenizer.added import NONE
from llama_jax.tokenizer.hf import hf_files

JOURNAL = 2  # raise it when what a journal vouches for is written otherwise
CHECKS = {
    "native": lambda model: None,
    "hf": hf.check_expressible,
    "meta": meta_params.check_expressible,
}


def convert(source: Source, to: Path, kind: str, dtype: np.dtype | None, progress, report) -> Path:
    """Write `source` as format `kind` into the new folder `to`. ValueError leaves nothing behind.

    A call that was killed goes on from what is there, when made again. progress(bytes of the source done).
    """
    config.choose(CHECKS, kind, "--format")(source.model)
    place = stage.check(to, source.files, job.is_unfinished)
    dtypes = {name: dtype or own for name, own in source.dtypes.items()}
    if dtype is not None:
        computed = dataclasses.replace(source.model, compute_dtype=compute_dtype(dtypes))
        source = dataclasses.replace(source, model=computed)
    beside = small_files(source, kind, dtypes, report)
    _announce_context(source, kind, report)
    with stage.held(place, to):
        # Killed while Orbax took the arrays over: some are moved already, and it starts anew.
        handing_over = any(place.glob(native.PARAMS + "*"))
        journal = job.Journal(place, _key(source, kind, dtype), anew=handing_over)
        if journal.remembered:
            report(f"going on in {place}: {len(journal.remembered)} tensors are there")
        _check_space(source, dtypes, journal, place)
        try:
            target = targets.TARGETS[kind](place, source.model, dtypes)
            with contextlib.closing(target):
                job.transfer(source, target, journal, dtype, progress)
            for name, content in beside.items():
                (place / name).parent.mkdir(exist_ok=True)
                (place / name).write_bytes(content)
            if to.exists():
                to.rmdir()
        except ValueError:
            journal.discard()
            raise
        except OSError as error:
            raise OSError(f"{place} ({error}); the same command goes on from there") from error
        journal.remove()
        os.replace(place, to)
    return to


def _announce_context(source: Source, kind: str, report) -> None:
    if kind == "meta":
        told = meta_params.context_of(meta_params.params_of(source.model))
        if told != source.context:
            report(
                f"Meta's params.json has no word for the {source.context} positions of this model: "
                f"its other settings are those of models with {told}"
            )


def _key(source: Source, kind: str, dtype: np.dtype | None) -> str:
    """What a journal is valid for: the same bytes, going the same way."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return json.dumps([JOURNAL, kind, str(dtype), stats])


def _check_space(source: Source, dtypes, journal: job.Journal, place: Path) -> None:
    need = sum(
        job.nbytes(unit, source) // source.dtypes[unit.hf].itemsize * dtypes[unit.hf].itemsize
        for unit in job.names.units(source.model)
        if unit.hf not in journal.remembered
    )
    try:
        stage.check_space(place, need)
    except OSError:
        if not journal.remembered:
            journal.discard()
        raise


def small_files(source: Source, kind: str, dtypes: dict, report) -> dict[str, bytes]:
    """What stands beside the weights: settings and tokenizer."""
    tokenizer = source.tokenizer
    own = {native.TOKENIZER: tokenizer.content} if tokenizer and tokenizer.content else {}
    if kind == "meta" and tokenizer and tokenizer.kind == "json":
        report("Meta's format has no place for a tokenizer.json: the tokenizer is left out")
        return {}
    if kind == "meta":
        names = _added_names(tokenizer) if tokenizer else []
        if names:
            report(
                f"Meta's format has no place for {len(names)} tokens that the checkpoint adds to its "
                f"tokenizer's file: {', '.join(names[:4])}{', ...' if names[4:] else ''}"
            )
        return own
    if kind == "native":
        origin = {"format": source.format, "files": [file.name for file in source.files[:8]]}
        said = native.description(source.model, source.context, tokenizer, origin)
        carried = {f"{native.CARRIED}/{name}": text for name, text in source.carried.items()}
        return {native.MODEL: _json(said), **own, **carried}
    ids = _special_ids(source)
    widest = max(dtypes.values(), key=lambda dtype: dtype.itemsize)
    settings = hf.settings_of(source.model, source.context, widest, ids)
    # Its tokenizer's own files leave as they came, also one of which Hugging Face's form cannot be made.
    came = {"tokenizer.json", native.TOKENIZER} & source.carried.keys()
    made = (
        hf_files(tokenizer.kind, tokenizer.content, tokenizer.additions) if own and not came else {}
    )
    generation = {"generation_config.json": _json({"_from_model_config": True, **ids})}
    return {**generation, **made, **source.carried, "config.json": _json(settings)}


def _added_names(tokenizer: Tokenizer) -> list[str]:
    """Of the tokens that the tokenizer's own file does not have."""
    own = formats.loaded(dataclasses.replace(tokenizer, additions=NONE)).special
    return [t.content for t in tokenizer.additions.tokens if own.get(t.content) != t.id]


def _special_ids(source: Source) -> dict[str, Any]:
    """Begin, end and padding, as the checkpoint came with them, else the tokenizer's."""
    ids: dict[str, Any] = {}
    if source.tokenizer is not None:
        tokenizer = formats.loaded(source.tokenizer)
        # Llama 3's chat models end a turn otherwise than a text, and transformers stops at these ids alone.
        turns = {tokenizer.special.get(f"<|{name}|>") for name in ("eot_id", "eom_id")} - {None}
        ends = sorted({tokenizer.eos} | turns)
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": ends if turns else tokenizer.eos}
    for said in (_object(source, "config.json"), _object(source, "generation_config.json")):
        ids |= {name: said[name] for name in _IDS if said.get(name) is not None}
    return ids


def _object(source: Source, name: str) -> dict[str, Any]:
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
