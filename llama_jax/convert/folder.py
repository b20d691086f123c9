"""The destination of a conversion: prepared beside its final name, completed, renamed at the very end."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import config
from llama_jax.convert import formats, hf, job, meta_params, native, targets
from llama_jax.convert.source import Source
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
    _check_free(to)
    stage = to.with_name(to.name + ".unfinished")
    _check_stage(source, to, stage)
    dtypes = {name: dtype or own for name, own in source.dtypes.items()}
    beside = small_files(source, kind, dtypes)
    _announce_context(source, kind, report)
    with _held(stage, to):
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
            for name, content in beside.items():
                (stage / name).parent.mkdir(exist_ok=True)
                (stage / name).write_bytes(content)
            if to.exists():
                to.rmdir()
        except ValueError:
            journal.discard()
            raise
        except OSError as error:
            raise OSError(f"{stage} ({error}); the same command goes on from there") from error
        journal.remove()
        os.replace(stage, to)
    return to


def _announce_context(source: Source, kind: str, report) -> None:
    if kind == "meta":
        told = meta_params.context_of(meta_params.params_of(source.model))
        if told != source.context:
            report(
                f"Meta's params.json has no word for the {source.context} positions of this model: "
                f"its other settings are those of models with {told}"
            )


def _check_free(to: Path) -> None:
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise ValueError(f"--to={to} is a link or a file; name a new folder")
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"--to={to} is there already; name a new folder")


def _check_stage(source: Source, to: Path, stage: Path) -> None:
    """Nothing that is not ours is written over or removed."""
    for file in source.files:
        for place in (stage, to):
            if file.resolve().is_relative_to(place.resolve()):
                raise ValueError(f"{file} lies in {place}, which is written; name another --to")
    if stage.is_symlink() or (stage.exists() and not job.is_unfinished(stage)):
        raise ValueError(f"{stage} is not an unfinished conversion; move it or name another --to")


@contextlib.contextmanager
def _held(stage: Path, to: Path) -> Iterator[None]:
    """The folder, made if it is not there, for this process alone.

    The lock is on the folder itself: it goes along when the folder is renamed, and with the process.
    """
    try:
        stage.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(stage, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"--to={to} cannot be written: {error.strerror}") from error
    try:
        if not _lock(descriptor) or not _is_at(descriptor, stage):
            raise ValueError(
                f"another conversion is writing {stage}; wait for its end or name another --to"
            )
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, as some of clusters are
        return True
    return True


def _is_at(descriptor: int, place: Path) -> bool:
    """Not so if another process has renamed the folder before it was locked here."""
    return place.exists() and os.path.samestat(os.fstat(descriptor), place.stat())


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
            journal.discard()
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
    ids: dict[str, Any] = {}
    if source.tokenizer is not None:
        tokenizer = formats.loaded(source.tokenizer)
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
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
