"""Carry a model from a source to a target, a block of rows at a time; resumable; whole or not at all.

Everything is written into `DIR.unfinished`, which becomes DIR at the very end. A journal in it says which
tensors are there for certain, so that the same command goes on where it was killed. Memory: a few blocks
of BLOCK_BYTES, whatever the model's size.
"""

import collections
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llama_jax import config
from llama_jax.convert import names
from llama_jax.convert.names import Unit
from llama_jax.convert.source import CheckpointSource
from llama_jax.convert.stored import check_finite

BLOCK_BYTES = 16 << 20  # as float32
THREADS = 3  # they wait for the disk and turn matrices, in turns
AHEAD = 4  # blocks that wait to be written
SYNC_BYTES = 1 << 30  # the journal is brought up to date this often


class Target(Protocol):
    """A format being written. Blocks of a tensor come in order."""

    def prepare(self, unit: Unit, rows: np.ndarray) -> np.ndarray:
        """The rows as the target stores them; called in threads."""
        ...

    def write(self, unit: Unit, start: int, stop: int, prepared: np.ndarray) -> None: ...

    def end(self, unit: Unit) -> Any:
        """What the journal must remember of a tensor, as JSON."""

    def sync(self) -> None:
        """What was written is on disk."""

    def close(self) -> None:
        """No more blocks will come, maybe for an error."""

    def finish(self, remembered: dict[str, Any]) -> None: ...

    @staticmethod
    def is_torn(folder: Path) -> bool:
        """Whether a killed `finish` left a folder that only a start from nothing mends."""
        ...


def blocks(unit: Unit, model: config.Model) -> Iterator[tuple[int, int]]:
    """(start, stop) rows of torch's matrix; whole heads, at most BLOCK_BYTES as float32."""
    height = names.torch_shape(unit.row, model)[0]
    step = rows_per_block(unit, model)
    return ((start, min(start + step, height)) for start in range(0, height, step))


def rows_per_block(unit: Unit, model: config.Model) -> int:
    height, *width = names.torch_shape(unit.row, model)
    together = names.unit_rows(unit.row, model)
    row_bytes = 4 * int(np.prod(width, dtype=np.int64))
    return min(max(BLOCK_BYTES // row_bytes // together, 1) * together, height)


def transfer(
    source: CheckpointSource,
    target: Target,
    journal: "Journal",
    dtype: np.dtype | None,
    progress: Callable[[int], object],
) -> None:
    """Read, check, cast and write every tensor that the journal does not have. progress(bytes read)."""
    todo = []
    for unit in names.units(source.model):
        if unit.hf in journal.remembered:
            progress(nbytes(unit, source))
        else:
            todo.append(unit)

    def make(unit: Unit, start: int, stop: int) -> tuple[int, np.ndarray]:
        rows = source.read(unit, start, stop)
        check_finite(rows, source.where(unit), unit.hf)
        return rows.nbytes, target.prepare(unit, cast(rows, dtype, source.where(unit), unit.hf))

    def jobs():
        for unit in todo:
            for start, stop in blocks(unit, source.model):
                yield unit, start, stop

    with futures.ThreadPoolExecutor(THREADS) as pool:
        waiting: collections.deque = collections.deque()

        def write_one():
            (unit, start, stop), future = waiting.popleft()
            read, prepared = future.result()
            target.write(unit, start, stop, prepared)
            if stop == names.torch_shape(unit.row, source.model)[0]:
                journal.add(unit.hf, target.end(unit), nbytes(unit, source), target.sync)
            progress(read)

        try:
            for job in jobs():
                if len(waiting) == AHEAD:
                    write_one()
                waiting.append((job, pool.submit(make, *job)))
            while waiting:
                write_one()
        finally:
            for _, future in waiting:
                future.cancel()
    journal.flush(target.sync)
    target.finish(journal.remembered)


def cast(rows: np.ndarray, dtype: np.dtype | None, file: Path, name: str) -> np.ndarray:
    """ValueError if a value is too large for the dtype."""
    if dtype is None or rows.dtype == dtype:
        return rows
    with np.errstate(over="ignore"):
        out = rows.astype(dtype)
    try:
        check_finite(out, file, name)
    except ValueError as error:
        raise ValueError(
            f"{file}: {name} has values that {dtype} cannot hold; try bfloat16"
        ) from error
    return out


def nbytes(unit: Unit, source: CheckpointSource) -> int:
    shape = names.torch_shape(unit.row, source.model)
    return int(np.prod(shape, dtype=np.int64)) * source.dtypes[unit.hf].itemsize


def total_bytes(source: CheckpointSource) -> int:
    return sum(nbytes(unit, source) for unit in names.units(source.model))


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is an unfinished conversion: empty, or with a journal of ours."""
    if not folder.is_dir():
        return False
    if {path.name for path in folder.iterdir()} <= {_NEW}:
        return True
    try:
        with open(folder / _JOURNAL) as file:
            return isinstance(json.loads(json.loads(file.readline())), list)
    except (OSError, ValueError, TypeError):
        return False


_JOURNAL, _NEW = "journal.jsonl", "journal.jsonl.new"
_NOTHING = "[]"  # the key of a journal that vouches for nothing


class Journal:
    """The tensors that are on disk for certain, one JSON object a line; a first line says of what."""

    def __init__(self, folder: Path, key: str, anew: bool):
        self._folder, self._file = folder, folder / _JOURNAL
        self.remembered: dict[str, Any] = {}
        self._new: list[str] = []
        self._unsynced = 0
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        if lines and lines[0] == json.dumps(key) and not anew:
            for line in lines[1:]:
                with contextlib.suppress(ValueError):  # the last may be cut off
                    self.remembered |= json.loads(line)
        else:
            self._clear()
            self._begin(key)

    def _begin(self, key: str) -> None:
        """At once, so that a folder in which something lies has a journal at any time."""
        (self._folder / _NEW).write_text(json.dumps(key) + "\n")
        os.replace(self._folder / _NEW, self._file)

    def _clear(self) -> None:
        """All but the journal is removed; killed on the way, it vouches for nothing."""
        self._begin(_NOTHING)
        for path in self._folder.iterdir():
            if path != self._file:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def add(self, name: str, value: Any, size: int, sync: Callable[[], None]) -> None:
        self.remembered[name] = value
        self._new.append(json.dumps({name: value}))
        self._unsynced += size
        if self._unsynced >= SYNC_BYTES:
            self.flush(sync)

    def flush(self, sync: Callable[[], None]) -> None:
        """The data first, then the lines that vouch for it."""
        sync()
        with open(self._file, "a") as file:
            file.write("".join(line + "\n" for line in self._new))
            file.flush()
            os.fsync(file.fileno())
        self._new, self._unsynced = [], 0

    def remove(self) -> None:
        self._file.unlink()

    def discard(self) -> None:
        """The folder and all that is in it."""
        self._clear()
        self.remove()
        self._folder.rmdir()
