"""Begin a run with trained weights (`train.init_from`), all of them trained or a part."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from llama_jax import config, files, tree
from llama_jax.convert import native
from llama_jax.data import prepare
from llama_jax.run import hosts
from llama_jax.train.program import Program


def pinned(run: config.Run, workdir: Path) -> config.Run:
    """The run with the checksum of the weights that it begins with. ValueError if it expects others.

    A run that trains every parameter needs its base no more once it has a checkpoint.
    """
    if not run.train.init_from:
        return run
    base = str(Path(run.train.init_from).expanduser().absolute())
    begins = dataclasses.replace(run.train, init_from=base)
    found = hosts.together(lambda: _recorded(run, begins, workdir) or native.check_base(begins))
    return dataclasses.replace(run, train=dataclasses.replace(begins, init_checksum=found))


def _recorded(run: config.Run, begins: config.Train, workdir: Path) -> str:
    """The checksum of this base in the workdir's run.json; "" where the base itself must be read."""
    path = workdir / "run.json"
    trained = files.committed(workdir / "checkpoints") and path.exists()
    if run.optim.train != config.Optim().train or not trained:
        return ""
    old = config.from_dict(json.loads(path.read_text())).train
    same = old.init_from == begins.init_from and begins.init_checksum in ("", old.init_checksum)
    return old.init_checksum if same else ""


def check(run: config.Run, prepared: prepare.Prepared) -> None:
    """ValueError if the weights to begin with are quantised, or know other tokens.

    Other settings of the network are printed: a run may change its RoPE scaling, for example.
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
