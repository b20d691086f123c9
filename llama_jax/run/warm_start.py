"""Begin a run with trained weights (`train.init_from`), all of them trained or a part."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax import config, files, tree
from llama_jax.convert import formats, native
from llama_jax.data import prepare
from llama_jax.run import hosts
from llama_jax.tokenizer import base
from llama_jax.tokenizer.base import Tokenizer
from llama_jax.train import checkpoint
from llama_jax.train.program import Program


def pinned(run: config.Run, recorded: Callable[[], config.Train | None]) -> config.Run:
    """The run with the folder, step and checksum of the weights that it begins with. All hosts must call it.

    They are those on record, if there are: a base that trains on meanwhile is not followed, and one that
    moved is told by its checksum. Else the first host chooses the step. ValueError, on every host, where one
    of them does not find these weights.
    """
    if not run.train.init_from:
        return run
    folder = Path(run.train.init_from).expanduser().absolute()
    begins = dataclasses.replace(run.train, init_from=str(folder))
    old = hosts.together(recorded)
    old = old if old and old.init_from else None

    def step() -> int:
        return begins.init_step or (old.init_step if old else _newest(folder))

    chosen = hosts.first_says(hosts.together(step if hosts.first() else lambda: 0))
    begins = dataclasses.replace(begins, init_step=chosen)
    checksum = hosts.together(lambda: _on_record(old, begins) or native.check_base(begins))
    return dataclasses.replace(run, train=dataclasses.replace(begins, init_checksum=checksum))


def recorded(workdir: Path) -> config.Train | None:
    """What a run that has checkpoints recorded of its beginning; None without. Each checkpoint says it, too:
    those that were taken into a new workdir, without run.json, keep the weights that they began with.
    """
    path, steps = workdir / "run.json", files.committed(workdir / "checkpoints")
    if not steps:
        return None
    if path.exists():
        return config.from_dict(json.loads(path.read_text())).train
    return config.from_dict(checkpoint.record(workdir / "checkpoints", steps[-1])["run"]).train


def _on_record(old: config.Train | None, begins: config.Train) -> str:
    """The checksum of these weights that a run recorded; "" where they must be read for it."""
    if old is None or (old.init_from, old.init_step) != (begins.init_from, begins.init_step):
        return ""
    return old.init_checksum if begins.init_checksum in ("", old.init_checksum) else ""


def _newest(folder: Path) -> int:
    try:
        formats.check_native(folder)
        return native.newest(folder)
    except ValueError as error:
        raise ValueError(f"train.init_from={folder}: {error}") from error


def check(run: config.Run, program: Program, prepared: prepare.Prepared) -> None:
    """ValueError if the weights to begin with are quantised, or know other tokens.

    Other settings of the network are printed: a run may change its RoPE scaling, for example.
    """
    folder = Path(run.train.init_from)
    if native.quantised(folder):
        raise ValueError(
            f"train.init_from={folder} holds quantised weights; give the folder that they were made from"
        )
    model, _, file = native.settings(folder)
    if file and (differs := _differing(file.load(), prepared.tokenizer)):
        use = (
            "'byte'" if file.kind == "byte" else f"'folder' and data.tokenizer.path={str(folder)!r}"
        )
        raise ValueError(
            f"train.init_from={folder} has another tokenizer than data.tokenizer: {differs}; set "
            f"data.tokenizer.kind={use}"
        )
    begun = dataclasses.replace(run, model=model)
    for line in config.diff(begun, run, essential=True):
        print(f"train.init_from has other settings: {line}")
    if program.frozen and run.train.init_step:
        print(
            f"the frozen parameters stay in checkpoint {run.train.init_step} of {folder}: keep it; a run "
            "that goes on there removes all but its newest checkpoints (checkpoint.keep)"
        )


def _differing(theirs: Tokenizer, ours: Tokenizer) -> str:
    """What differs between two tokenizers; "" if nothing does."""
    if theirs.fingerprint != ours.fingerprint:
        return "it gives texts other ids"
    of_theirs, of_ours = base.named(theirs), base.named(ours)
    differing = [name for name in of_theirs if of_theirs[name] != of_ours[name]]
    if not differing:
        return ""
    names = sorted({name for name, _ in theirs.special.items() ^ ours.special.items()})
    few = f" ({', '.join(names[:4])}{', ...' if names[4:] else ''})" if names else ""
    return f"other {', '.join(differing)}{few}"


def weights(run: config.Run, program: Program, trained: bool) -> Any:
    """The trained parameters of `train.init_from`, float32, or the frozen ones, in the compute dtype.

    Those of the step that `pinned` found. ValueError if they are gone or others: a run that resumes needs
    the frozen ones alone, and reads the folder here for the first time.
    """
    native.check_base(run.train)
    mine = tree.flat(program.objective.letters).keys()
    dtype = "float32" if trained else run.model.compute_dtype
    pick = lambda path: (path in mine) == trained  # noqa: E731
    return native.load(Path(run.train.init_from), program.module, dtype, pick, run.train.init_step)
