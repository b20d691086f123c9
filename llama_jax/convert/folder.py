"""The destination of a conversion: prepared beside its final name, completed, renamed at the very end."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import config
from llama_jax.convert import formats, hf, job, meta_params, native, targets
from llama_jax.convert.source import Source
from llama_jax.tokenizer.hf import hf_files

JOURNAL = 1  # raise it when what a journal vouches for is written otherwise
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
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise ValueError(f"--to={to} is there already; name a new folder")
    dtypes = {name: dtype or own for name, own in source.dtypes.items()}
    stage = to.with_name(to.name + ".unfinished")
    try:
        stage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--to={to} cannot be written: {error.strerror}") from error
    # Killed while Orbax took the arrays over: some are moved already, and it starts anew.
    handing_over = any(stage.glob(native.PARAMS + "*"))
    journal = job.Journal(stage, _key(source, kind, dtype), anew=handing_over)
    if journal.remembered:
        report(f"going on in {stage}: {len(journal.remembered)} tensors are there")
    _check_space(source, dtypes, journal, stage)
    try:
        target = targets.TARGETS[kind](stage, source.model, dtypes)
        with contextlib.closing(target):
            job.transfer(source, target, journal, dtype, progress)
    except ValueError:
        shutil.rmtree(stage)
        raise
    except OSError as error:
        raise OSError(f"{stage} ({error}); the same command goes on from there") from error
    for name, content in small_files(source, kind, dtypes).items():
        (stage / name).parent.mkdir(exist_ok=True)
        (stage / name).write_bytes(content)
    journal.remove()
    if to.exists():
        to.rmdir()
    os.replace(stage, to)
    return to


def _key(source: Source, kind: str, dtype: np.dtype | None) -> str:
    """What a journal is valid for: the same bytes, going the same way."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return json.dumps([JOURNAL, kind, str(dtype), stats])


def _check_space(source: Source, dtypes, journal: job.Journal, stage: Path) -> None:
    need = sum(
        job.nbytes(unit, source) // source.dtypes[unit.hf].itemsize * dtypes[unit.hf].itemsize
        for unit in job.names.units(source.model)
        if unit.hf not in journal.remembered
    )
    free = shutil.disk_usage(stage).free
    if need > free:
        if not journal.remembered:
            shutil.rmtree(stage)
        raise OSError(
            f"{stage} needs {need / 2**30:.1f} GiB more, but {free / 2**30:.1f} GiB are free"
        )


def small_files(source: Source, kind: str, dtypes: dict[str, np.dtype]) -> dict[str, bytes]:
    """What stands beside the weights: settings and tokenizer."""
    tokenizer = source.tokenizer
    own = {native.TOKENIZER: tokenizer.content} if tokenizer and tokenizer.content else {}
    if kind == "meta":
        return own
    if kind == "native":
        said = {
            "model": config.to_dict(source.model),
            "context": source.context,
            "tokenizer": tokenizer.kind if tokenizer else "none",
            "from": {"format": source.format, "files": [file.name for file in source.files[:8]]},
        }
        carried = {f"{native.CARRIED}/{name}": text for name, text in source.carried.items()}
        return {native.MODEL: _json(said), **own, **carried}
    ids = _special_ids(source)
    widest = max(dtypes.values(), key=lambda dtype: dtype.itemsize)
    settings = hf.settings_of(source.model, source.context, widest, ids)
    made = hf_files(tokenizer.kind, tokenizer.content) if own else {}
    generation = {"generation_config.json": _json({"_from_model_config": True, **ids})}
    return {**generation, **made, **source.carried, "config.json": _json(settings)}


def _special_ids(source: Source) -> dict[str, Any]:
    """Begin, end and padding, as the checkpoint came with them, else the tokenizer's."""
    carried = json.loads(source.carried.get("generation_config.json", b"{}"))
    ids = {name: carried[name] for name in _IDS if carried.get(name) is not None}
    if ids or source.tokenizer is None:
        return ids
    tokenizer = formats.loaded(source.tokenizer)
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
