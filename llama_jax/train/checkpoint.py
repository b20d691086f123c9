"""Checkpoints: the state, and a record of what made it. Orbax writes them, asynchronously, atomically.

A folder `checkpoints/<step>` holds `state` (the arrays) and `record` (JSON: the run, the place in the
data, provenance, a checksum of each array). A folder without Orbax's commit is never listed. One that cannot
be read, or whose arrays do not match their checksums, is set aside and the one before is taken.
"""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llama_jax import config, tree

PIECE_BYTES = 16 << 20


class SaveError(Exception):
    """A checkpoint could not be written; says which, why, and which is still good."""


@dataclasses.dataclass(frozen=True)
class Restored:
    state: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one working directory."""

    def __init__(self, workdir: str, options: config.Checkpoint):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=options.keep, enable_async_checkpointing=True
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
        record = {**record, "checksums": checksums(state)}
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

    def latest(self, target: Any, report=print) -> Restored | None:
        """The newest readable checkpoint in the shapes and shardings of `target`; None if there is none.

        Newer ones that could not be read are renamed to `<step>.unreadable` and reported. RuntimeError
        when there were checkpoints and none is readable: starting afresh would overwrite them; and on several
        hosts at the first unreadable one.
        """
        failures: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, target)
            except Exception as error:  # Orbax and TensorStore raise a dozen kinds
                failures[step] = _first_line(error)
                if jax.process_count() > 1:  # the others may have read theirs: no way back here
                    raise RuntimeError(
                        f"checkpoint {step} is unreadable on host {jax.process_index()} ({failures[step]}); "
                        f"rename {self.folder / str(step)} and start again: the one before is taken"
                    ) from error
                report(f"WARNING: checkpoint {step} is unreadable ({failures[step]})")
                continue
            for bad in failures:
                (self.folder / str(bad)).rename(self.folder / f"{bad}.unreadable")
                report(f"WARNING: checkpoint {bad} is set aside; going on from step {step}")
            self._manager.reload()
            return restored
        if failures:
            raise RuntimeError(
                f"none of the checkpoints {sorted(failures)} in {self.folder} is readable; "
                f"mend them, or train in another --workdir"
            )
        return None

    def record(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).record

    def _restore(self, step: int, target: Any) -> Restored:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        found, wanted = checksums(restored.state), restored.record["checksums"]
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(f"{name} does not match its checksum")
        return Restored(restored.state, restored.record)


def _pieces(state: Any) -> Any:
    """Arrays are stored a layer at a time, in pieces of at most PIECE_BYTES: other shardings, and
    conversions, read only what they want."""

    def choose(keys, leaf):
        layered = leaf.ndim > 1 and "groups/" in tree.path(keys)
        return ocp.SaveArgs(shard_axes=(0,) if layered else (), chunk_byte_size=PIECE_BYTES)

    return jax.tree.map_with_path(choose, state)


@jax.jit
def _sums(state: Any) -> Any:
    """The sum of each array's bits as unsigned integers, modulo 2^32: the same in any order."""

    def bits(leaf):
        raw = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(raw.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bits, state)


def checksums(state: Any) -> dict[str, int]:
    """{path: checksum} of every array. Sums of bits are independent of how an array is sharded."""
    return {name: int(np.asarray(value)) for name, value in tree.paths(_sums(state)).items()}


def _first_line(error: Exception) -> str:
    """TensorStore's lines are long and have the system's reason anywhere: that first, then the end."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    short = line if len(line) < 160 else f"... {line[-160:]}"
    number = re.search(r"os_error_code='(\d+)'", line)
    reason = os.strerror(int(number[1])) if number else ""
    return short if reason in short else f"{reason}: {short}"
