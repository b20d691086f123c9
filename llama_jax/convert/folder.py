"""The destination of a conversion: prepared beside its final name, completed, renamed at the very end."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llama_jax import config
from llama_jax.convert import formats, job, names, stage
from llama_jax.convert.source import CheckpointSource, compute_dtype

JOURNAL = 2  # raise it when what a journal vouches for is written otherwise


def convert(
    source: CheckpointSource,
    to: Path,
    kind: str,
    dtype: np.dtype | None,
    progress: Callable[[int], object],
    report: Callable[[str], object],
) -> Path:
    """Write `source` as format `kind` into the new folder `to`. ValueError leaves nothing behind.

    A call that was killed goes on from what is there, when made again. progress(bytes of the source done).
    """
    written = config.choose(formats.WRITTEN, kind, "--format")
    assert written.extras is not None, "what is written has its small files"
    written.check(source.model)
    place = stage.check(to, source.files, job.is_unfinished)
    dtypes = {name: dtype or own for name, own in source.dtypes.items()}
    if dtype is not None:
        computed = dataclasses.replace(source.model, compute_dtype=compute_dtype(dtypes))
        source = dataclasses.replace(source, model=computed)
    beside = written.extras(source, dtypes, report)
    with stage.held(place, to):
        journal = job.Journal(place, _key(source, kind, dtype), anew=written.target.is_torn(place))
        if journal.remembered:
            report(f"going on in {place}: {len(journal.remembered)} tensors are there")
        _check_space(source, dtypes, journal, place)
        try:
            target = written.target(place, source.model, dtypes)
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


def _key(source: CheckpointSource, kind: str, dtype: np.dtype | None) -> str:
    """What a journal is valid for: the same bytes, going the same way."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return json.dumps([JOURNAL, kind, str(dtype), stats])


def _check_space(source: CheckpointSource, dtypes, journal: job.Journal, place: Path) -> None:
    need = sum(
        job.nbytes(unit, source) // source.dtypes[unit.hf].itemsize * dtypes[unit.hf].itemsize
        for unit in names.units(source.model)
        if unit.hf not in journal.remembered
    )
    try:
        stage.check_space(place, need)
    except OSError:
        if not journal.remembered:
            journal.discard()
        raise
