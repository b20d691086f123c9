"""Checkpoints: the state, and a record of what made it. Orbax writes them, asynchronously, atomically.

A folder `checkpoints/<step>` holds `state` (the arrays) and `record` (JSON: the run, the place in the
data, provenance, a checksum of each array). It is written in place, and complete once Orbax's commit file is
in it: no folder is renamed, which on a mounted bucket is neither atomic nor cheap. A folder without that file
is not a checkpoint. One that some host cannot read, or whose arrays do not match their checksums, is set
aside by all hosts together, and the one before is taken.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llama_jax import config, files, tree

PIECE_BYTES = 16 << 20
RETRY_SECONDS = 2.0  # before a checkpoint that could not be read is read once more
REASON_BYTES = 240  # of a host's reason, told to the others
CHECKSUMS, OLD_CHECKSUMS = "hashes", "checksums"  # of a record
READ, UNREADABLE, NO_MEMORY = range(3)  # what came of reading a checkpoint; the worst host's counts


class SaveError(Exception):
    """A checkpoint could not be written; says which, why, and which is still good."""


@dataclasses.dataclass(frozen=True)
class Restored:
    state: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one working directory."""

    def __init__(self, workdir: str | Path, options: config.Checkpoint):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=options.keep,
                enable_async_checkpointing=True,
                atomicity_options=ocp.options.AtomicityOptions(
                    ocp.options.AtomicityMode.COMMIT_FILE
                ),
            ),
            item_names=("state", "record"),
        )
        self._saving = 0

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Start a save; the arrays are copied first, so the state may be donated to the next step.

        SaveError, here or in `wait`, when the disk does not take it.
        """
        self.wait()
        self._saving = step
        record = {**record, CHECKSUMS: checksums(state)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state, _pieces(state)), record=ocp.args.JsonSave(record)
        )
        with self._failing_clearly():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Until the last save is on disk. SaveError if it is not."""
        with self._failing_clearly():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failing_clearly(self):
        try:
            yield
        except Exception as error:  # Orbax passes on whatever TensorStore or the system raised
            self._manager.reload()
            good = [step for step in self.steps() if step != self._saving]
            kept = (
                f"the checkpoint of step {good[-1]} is good" if good else "there is none before it"
            )
            raise SaveError(
                f"the checkpoint of step {self._saving} could not be written to {self.folder} "
                f"({_first_line(error)}); {kept}"
            ) from error

    def clean(self) -> list[str]:
        """Remove what interrupted saves left, and return its names.

        Only for the process that holds the workdir, before its first save.
        """
        complete = {str(step) for step in files.committed(self.folder)}
        left = [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_dir()
            and (
                ".orbax-checkpoint-tmp" in path.name
                or (path.name.isdecimal() and path.name not in complete)
            )
        ]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in left]

    def latest(self, target: Any, report: Callable[[str], object] = print) -> Restored | None:
        """The newest readable checkpoint in the shapes and shardings of `target`; None if there is none.

        All hosts must call it and take the same one: what one of them cannot read, none takes. Newer
        ones that could not be read are renamed to `<step>.unreadable` and reported. RuntimeError when
        there were checkpoints and none is readable, since starting afresh would overwrite them, and when
        memory was too small for one, which says nothing against it.
        """
        failures: list[int] = []
        for step in self._listed():
            outcome, restored, reason = self._restore(step, target)
            if outcome == UNREADABLE:  # a network file system may have hiccuped
                time.sleep(RETRY_SECONDS)
                outcome, restored, reason = self._restore(step, target)
            if outcome == NO_MEMORY:
                raise RuntimeError(
                    f"checkpoint {step} in {self.folder} does not fit into memory ({reason}); it is "
                    "left as it is: free memory, or use more devices"
                )
            if outcome == READ:
                self._set_aside(failures)
                for bad in failures:
                    report(f"WARNING: checkpoint {bad} is set aside; going on from step {step}")
                return restored
            report(f"WARNING: checkpoint {step} is unreadable ({reason})")
            failures.append(step)
        if failures:
            raise RuntimeError(
                f"none of the checkpoints {sorted(failures)} in {self.folder} is readable; "
                f"mend them, or train in another --workdir"
            )
        return None

    def record(self, step: int) -> dict[str, Any]:
        return record(self.folder, step)

    def _listed(self) -> list[int]:
        """Steps of complete checkpoints, newest first, as the first host sees them."""
        steps = files.committed(self.folder)[::-1]
        if jax.process_count() == 1:
            return steps
        count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
        if count == 0:
            return []
        padded = np.array((steps + [0] * count)[:count], np.int32)
        return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]

    def _restore(self, step: int, target: Any) -> tuple[int, Restored | None, str]:
        """(outcome, checkpoint, reason), the same outcome on every host.

        Reading waits for no other host, so that a host which fails does not keep the others waiting.
        """
        outcome, restored, reason = READ, None, ""
        try:
            handler = ocp.StandardCheckpointHandler()
            args = ocp.args.StandardRestore(target)
            # The annotation of Orbax wants a path of its own kind.
            place: Any = self.folder / str(step) / "state"
            state = handler.restore(place, args=args)
            restored = Restored(state, self.record(step))
            sums, wanted = _sums_of(restored.record)
        except Exception as error:  # Orbax and TensorStore raise a dozen kinds
            outcome, reason = _kind(error), _first_line(error)
        outcome, reason = _worst(outcome, reason)
        if outcome != READ:
            return outcome, None, reason
        assert restored
        found = sums(restored.state)
        if bad := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
            outcome, reason = UNREADABLE, f"{bad[0]} does not match its checksum"
        outcome, reason = _worst(outcome, reason)
        return outcome, restored if outcome == READ else None, reason

    def _set_aside(self, steps: list[int]) -> None:
        """Rename checkpoints; of those that were set aside earlier only the newest stays."""
        if steps and jax.process_index() == 0:
            for old in self.folder.glob("*.unreadable*"):
                shutil.rmtree(old, ignore_errors=True)
            for step in steps:
                (self.folder / str(step)).rename(_free(self.folder / f"{step}.unreadable"))
        _worst(READ, "")  # the others list what is there after that
        self._manager.reload()


def record(folder: Path, step: int) -> dict[str, Any]:
    """What made the checkpoint of a step, in a folder `checkpoints`."""
    return json.loads((folder / str(step) / "record" / "metadata").read_text())


def _sums_of(record: dict[str, Any]) -> tuple[Callable[[Any], dict[str, int]], dict[str, int]]:
    """How the checksums of a checkpoint are computed, and which it has."""
    if CHECKSUMS in record:
        return checksums, record[CHECKSUMS]
    return sums_of_bits, record[OLD_CHECKSUMS]


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... at which there is nothing."""
    names = (path.with_name(f"{path.name}-{n}") if n > 1 else path for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def _kind(error: Exception) -> int:
    """What an error of reading says: too little memory says nothing against the checkpoint."""
    no_memory = isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM
    return NO_MEMORY if no_memory or "RESOURCE_EXHAUSTED" in str(error) else UNREADABLE


def _worst(outcome: int, reason: str) -> tuple[int, str]:
    """The worst outcome of all hosts, and that host's reason. All must call it."""
    if jax.process_count() == 1:
        return outcome, reason
    text = reason.encode()[:REASON_BYTES].ljust(REASON_BYTES)
    every = multihost_utils.process_allgather(np.frombuffer(bytes([outcome]) + text, np.uint8))
    host = int(every[:, 0].argmax())
    said = every[host, 1:].tobytes().decode(errors="ignore").strip()
    return int(every[host, 0]), f"host {host}: {said}"


def _pieces(state: Any) -> Any:
    """Arrays are stored a layer at a time, in pieces of at most PIECE_BYTES: other shardings, and
    conversions, read only what they want."""

    def choose(keys, leaf):
        layered = leaf.ndim > 1 and "groups/" in tree.path(keys)
        return ocp.SaveArgs(shard_axes=(0,) if layered else (), chunk_byte_size=PIECE_BYTES)

    return jax.tree.map_with_path(choose, state)


def checksums(state: Any) -> dict[str, int]:
    """{path: 32 bits that depend on every bit of that array and on its place}, however it is sharded.

    Arrays of any dtype of at most 32 bits, typed random keys included.
    """
    return _integers(_hashes(state))


def sums_of_bits(state: Any) -> dict[str, int]:
    """The checksums of checkpoints written before `checksums` knew places: they miss swapped blocks."""
    add = lambda leaf: jnp.sum(_bits(leaf), dtype=jnp.uint32)  # noqa: E731
    return _integers(jax.jit(lambda state: jax.tree.map(add, state))(state))


def _integers(of_leaves: Any) -> dict[str, int]:
    return {name: int(np.asarray(value)) for name, value in tree.paths(of_leaves).items()}


@jax.jit
def _hashes(state: Any) -> Any:
    """The sum modulo 2^32 of a hash of each entry and its indices: the same in any order."""

    def one(leaf):
        raw = _bits(leaf)
        place = jnp.zeros((), jnp.uint32)
        for axis in range(raw.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, raw.shape, axis)
            place = place + index * jnp.uint32(_ODD[axis])
        return jnp.sum(_mixed(raw ^ _mixed(place)), dtype=jnp.uint32)

    return jax.tree.map(one, state)


def _bits(leaf: jax.Array) -> jax.Array:
    """An array's bits as uint32, one for each entry."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool:
        return leaf.astype(jnp.uint32)
    bits = jnp.iinfo(leaf.dtype).bits if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize
    return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


# Multipliers of the indices, odd and unrelated: bits of the golden ratio and of square roots of primes.
_ODD = (0x9E3779B9, 0x6A09E667, 0xBB67AE85, 0x3C6EF373, 0xA54FF53B, 0x510E527F, 0x1F83D9AB)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of x changes half of the bits (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _first_line(error: Exception) -> str:
    """TensorStore's lines are long and have the system's reason anywhere: that first, then the end."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    short = line if len(line) < 160 else f"... {line[-160:]}"
    number = re.search(r"os_error_code='(\d+)'", line)
    reason = os.strerror(int(number[1])) if number else ""
    return short if reason in short else f"{reason}: {short}"
