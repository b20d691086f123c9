"""A folder of a network in smaller weights: written here, read by native.py like any other of ours."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from llama_jax import config, tree
from llama_jax.convert import native, stage

_MARK = "quantising"  # a file in the folder for as long as it is not whole


@contextlib.contextmanager
def new(to: Path, origin: Path, need: float) -> Iterator[Path]:
    """Where the folder `to` is written, about `need` bytes; it has its name when this ends well, or is gone.

    origin: the folder that is read meanwhile. ValueError or OSError, before anything is done, if it cannot
    be.
    """
    place = stage.check(to, [origin], _is_ours)
    with stage.held(place, to):
        try:
            for left in place.iterdir():  # by a call that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            (place / _MARK).touch()
            stage.check_space(place, need)
            yield place
        except BaseException:
            shutil.rmtree(place)
            raise
        (place / _MARK).unlink()
        if to.exists():
            to.rmdir()
        os.replace(place, to)


def _is_ours(place: Path) -> bool:
    return place.is_dir() and ((place / _MARK).is_file() or not any(place.iterdir()))


def write(place: Path, origin: Path, params: Any, quant: config.Quant, text: str) -> None:
    """The network of `origin` with the parameters `params`. text: what they were calibrated on."""
    model, context, tokenizer = native.settings(origin)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((place / native.PARAMS).absolute(), tree.nest(tree.paths(params)))
    came = {"format": "native", "files": [origin.name]}
    if quant.reads_text:
        came["calibrated"] = text
    said = native.description(model, context, tokenizer, came) | {
        native.QUANT: config.to_dict(quant)
    }
    (place / native.MODEL).write_text(json.dumps(said, indent=2) + "\n")
    if tokenizer and tokenizer.content:
        (place / native.TOKENIZER).write_bytes(tokenizer.content)
    if (origin / native.CARRIED).is_dir():
        shutil.copytree(origin / native.CARRIED, place / native.CARRIED)
