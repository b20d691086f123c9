"""Begin a run with trained weights (`train.init_from`), all of them trained or a part."""

import dataclasses
from pathlib import Path
from typing import Any

from llama_jax import config, tree
from llama_jax.convert import native
from llama_jax.data import prepare
from llama_jax.run import hosts
from llama_jax.train.program import Program


def pinned(run: config.Run) -> config.Run:
    """The run with the checksum of the weights that it begins with. ValueError if it expects others."""
    if not run.train.init_from:
        return run
    found = hosts.together(lambda: native.check_base(run.train))
    base = str(Path(run.train.init_from).expanduser().absolute())
    train = dataclasses.replace(run.train, init_from=base, init_checksum=found)
    return dataclasses.replace(run, train=train)


def check(run: config.Run, prepared: prepare.Prepared) -> None:
    """ValueError if the weights to begin with are quantised, or know other tokens.

    Other settings of the network are reported: a study may change them.
    """
    folder = Path(run.train.init_from)
    if native.quantised(folder):
        raise ValueError(
            f"train.init_from={folder} holds quantised weights; give the folder that they were made from"
        )
    model, _, file = native.settings(folder)
    if file and (found := file.load().fingerprint) != prepared.tokenizer.fingerprint:
        raise ValueError(
            f"train.init_from={folder} was trained on tokens of {found}, and data.tokenizer is "
            f"{prepared.tokenizer.fingerprint}; set data.tokenizer to the one in {folder}"
        )
    base = dataclasses.replace(run, model=model)
    for line in config.diff(base, run, essential=True):
        print(f"train.init_from has other settings: {line}")


def weights(run: config.Run, program: Program, trained: bool) -> Any:
    """The trained parameters of `train.init_from`, float32, or the frozen ones, in the compute dtype."""
    mine = tree.flat(program.objective.letters).keys()
    dtype = "float32" if trained else run.model.compute_dtype
    pick = lambda path: (path in mine) == trained  # noqa: E731
    return native.load(Path(run.train.init_from), program.module, dtype, pick)
