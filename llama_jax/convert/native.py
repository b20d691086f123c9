"""Our own folders: a converted model, or the workdir of a training run.

A model's folder holds `model.json` (settings, tokenizer, where it came from), `params` (an Orbax checkpoint
of the parameter tree, layers stacked, arrays in pieces of at most BLOCK_BYTES so that a host reads only what
its devices hold), the tokenizer's file, and `huggingface/` when small files came with it. A run that began
with such a model has these files in its workdir, too.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from llama_jax import config, dims, files, tree
from llama_jax.convert import json_file, names
from llama_jax.convert.names import Unit
from llama_jax.convert.source import CheckpointSource, TokenizerFile, tokenizer_of
from llama_jax.model import transformer
from llama_jax.model.quantised import Quantised, check_blocks, spread
from llama_jax.model.transformer import Transformer
from llama_jax.tokenizer import in_folder
from llama_jax.tokenizer.added import NONE

MODEL, PARAMS, TOKENIZER, CARRIED = in_folder.MODEL, "params", in_folder.FILE, "huggingface"
QUANT, ADDITIONS = "quant", in_folder.OF_MODEL  # of model.json
_TOKENIZERS = ("byte", "sp", "bpe", "json", "none")


def is_native(folder: Path) -> bool:
    return (folder / MODEL).is_file() or (folder / "run.json").is_file()


def run_of(path: Path) -> Path | None:
    """The workdir of the run that a folder `checkpoints`, or one within it, is part of."""
    for folder in path.parents:
        if (folder / "run.json").is_file() and path.is_relative_to(folder / "checkpoints"):
            return folder
    return None


def settings(folder: Path) -> tuple[config.Model, int, TokenizerFile | None]:
    """Settings, positions trained for and tokenizer of a folder. ValueError if it is not one of ours."""
    if not is_native(folder):
        raise ValueError(f"{folder} is no model of ours: it has no {MODEL} and no run.json")
    if not (folder / MODEL).is_file():
        _place(folder)
    try:
        if (folder / MODEL).is_file():
            said = json_file.read(folder / MODEL)
            model = config.from_dict(said["model"], config.Model, "model")
            context = json_file.value(said, "context", int, folder / MODEL)
            bytewise = config.choose(_TOKENIZERS, said["tokenizer"], "tokenizer") == "byte"
        else:
            run = config.from_dict(json_file.read(folder / "run.json"))
            model = run.model
            context, bytewise = run.data.seq_len, run.data.tokenizer.kind == "byte"
        additions = in_folder.additions(str(folder))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}: its settings cannot be read ({error})") from error
    if (folder / TOKENIZER).is_file():
        own = tokenizer_of((folder / TOKENIZER).read_bytes())
        return model, context, dataclasses.replace(own, additions=additions)
    return model, context, TokenizerFile("byte") if bytewise else None


def description(
    model: config.Model, context: int, tokenizer: TokenizerFile | None, origin: dict[str, Any]
) -> dict[str, Any]:
    """What model.json says. origin: the format and the files that the weights came from."""
    kind = tokenizer.kind if tokenizer else "none"
    added = {}
    if tokenizer and tokenizer.additions != NONE:
        added = {ADDITIONS: in_folder.to_dict(tokenizer.additions)}
    return {
        "model": config.to_dict(model), "context": context, "tokenizer": kind, **added, "from": origin,
    }  # fmt: skip


def load(
    folder: Path,
    module: Transformer,
    dtype: str = "float32",
    pick: Callable[[str], bool] = lambda path: True,
    step: int = 0,
) -> Any:
    """The parameters whose paths are picked, in `dtype` or quantised, in the shardings of `module.layout`.

    step: the checkpoint of a run's workdir; 0: the newest. A host reads what its devices hold, and casts it
    while it reads: bfloat16 never takes more than 2 bytes a parameter. Quantised matrices stay as they are
    stored.
    """
    picked, _ = tree.split(transformer.abstract(module), pick)
    arrays = _arrays(folder, step, tree.paths(picked))
    said = quantised(folder)
    letters = tree.paths(transformer.letters(module))

    def one(name: str, shape: tuple[int, ...], dtype=None):
        if name not in arrays or arrays[name].shape != shape:
            found = arrays[name].shape if name in arrays else "absent"
            raise ValueError(
                f"{folder} does not hold the parameters of its settings: {name}: {found} -> {shape}"
            )
        return name, shape, dtype or arrays[name].dtype.numpy_dtype

    wanted = {}
    for name, leaf in tree.paths(picked).items():
        values, scale = f"{name}/values", f"{name}/scale"
        if said and values in arrays and scale in arrays:
            blocks = _blocks(arrays[scale], leaf, folder)
            check_blocks(module.layout, letters[name], blocks, f"{folder}: {name}")
            wanted[name] = one(values, leaf.shape), one(scale, blocks)
        else:
            wanted[name] = (one(name, leaf.shape, jnp.dtype(dtype)),)

    def read(name: str, shape: tuple[int, ...], dtype, letters: str):
        letters = spread(letters, shape)
        module.layout.check(shape, letters, name)
        return _loaded(arrays[name], shape, dtype, module.layout.param(letters), folder)

    loaded = {}
    for name, parts in wanted.items():
        made = [read(*part, letters=letters[name]) for part in parts]
        loaded[name] = made[0]
        if len(made) == 2:
            assert said is not None, (
                "a matrix has scales where model.json says how it was quantised"
            )
            loaded[name] = Quantised(made[0], made[1], said.activations)
    return tree.nest(loaded)


def _blocks(scale: ts.TensorStore, leaf, folder: Path) -> tuple[int, ...]:
    """The shape of the scales of a matrix. ValueError if they do not cut it into equal blocks."""
    shape = tuple(scale.shape)
    if len(shape) != len(leaf.shape) or any(
        n == 0 or size % n for size, n in zip(leaf.shape, shape, strict=True)
    ):
        raise ValueError(f"{folder}: scales of shape {list(shape)} do not fit {list(leaf.shape)}")
    return shape


def quantised(folder: Path) -> config.Quant | None:
    """How the weights of a folder were made smaller; None if they are as they were trained."""
    if not (folder / MODEL).is_file():
        return None
    said = json_file.read(folder / MODEL).get(QUANT)
    return None if said is None else config.from_dict(said, config.Quant, QUANT)


def identity(folder: Path, step: int = 0) -> str:
    """Of the stored parameters: those of another save have another, a copy of the folder has the same.

    step: as in `load`. By name, size and beginning of every file, so that a large checkpoint need not be read
    for it.
    """
    place, _ = _place(folder, step)
    digest = hashlib.sha256()
    for file in sorted(file for file in place.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(place)} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_BEGINNING_BYTES))
    return digest.hexdigest()


_BEGINNING_BYTES = 1 << 16


def _loaded(
    array: ts.TensorStore, shape, dtype, sharding: jax.sharding.Sharding, folder: Path
) -> jax.Array:
    """One array, each part read for the device that holds it.

    By TensorStore, not by Orbax: its restore ends at a missing chunk in 200 lines of coroutines.
    """
    cast = ts.cast(array, dtype)
    try:
        return jax.make_array_from_callback(
            shape, sharding, lambda index: cast[index].read().result()
        )
    except ValueError as error:
        raise ValueError(f"{folder} is damaged ({_line(error)})") from error


def open_folder(folder: Path, tokenizer: TokenizerFile | None) -> CheckpointSource:
    model, context, own = settings(folder)
    if (said := quantised(folder)) is not None:
        raise ValueError(
            f"{folder} holds weights of {said.bits} bits, which no other format here has; convert the "
            "folder that they were made from"
        )
    step = newest(folder)
    # All groups of layers are in the same arrays; how many the settings say is not yet known to be true.
    group = dataclasses.replace(model, layers=len(model.pattern), unroll=1)
    arrays = _arrays(folder, step, [unit.path for unit in names.units(group)])
    depths = {array.shape[:1] for path, array in arrays.items() if path.startswith("groups/")}
    if depths != {(model.groups,)}:
        raise ValueError(
            f"{folder}: its arrays hold {[n for depth in depths for n in depth]} layer groups, but the "
            f"settings say {model.groups}"
        )
    units = names.units(model)
    for unit in units:
        if unit.path not in arrays:
            raise ValueError(f"{folder} lacks the array {unit.path}")
        shape = _stacked_shape(unit, model)
        if arrays[unit.path].shape != shape:
            raise ValueError(
                f"{folder}: {unit.path} has shape {list(arrays[unit.path].shape)}, but the settings "
                f"say {list(shape)}"
            )
    place, _ = _place(folder, step)
    return CheckpointSource(
        "native",
        model,
        context,
        {unit.hf: arrays[unit.path].dtype.numpy_dtype for unit in units},
        functools.partial(_read, model, arrays),
        lambda unit: place,
        (_said(folder), *sorted(file for file in place.rglob("*") if file.is_file())),
        tokenizer or own,
        carried=carried_files(folder),
        notes=(f"the parameters in {place}",),
    )


def carried_files(folder: Path) -> dict[str, bytes]:
    """Hugging Face's small files that came with a model, by name."""
    carried = sorted((folder / CARRIED).glob("*")) if (folder / CARRIED).is_dir() else ()
    return {file.name: file.read_bytes() for file in carried}


def _read(model: config.Model, arrays, unit: Unit, start: int, stop: int) -> np.ndarray:
    rows = (
        slice(start // names.unit_rows(unit.row, model), stop // names.unit_rows(unit.row, model)),
    )
    index = (slice(None),) * names.lead(unit.row) + rows
    if unit.group >= 0:
        index = (unit.group, *index)
    return names.to_torch(arrays[unit.path][index].read().result(), unit.row, model)


def _stacked_shape(unit: Unit, model: config.Model) -> tuple[int, ...]:
    return dims.shape(("L" if unit.group >= 0 else "") + unit.row.letters, model)


def _said(folder: Path) -> Path:
    """The file of the settings."""
    return folder / (MODEL if (folder / MODEL).is_file() else "run.json")


def newest(folder: Path) -> int:
    """The step of a run's newest checkpoint, 0 for a converted model. ValueError if there are no weights.

    A run that goes on has a newer one a moment later: who reads twice asks once, and passes the step on.
    """
    if (folder / PARAMS).is_dir():
        return 0
    steps = files.committed(folder / "checkpoints")
    if not steps:
        raise ValueError(
            f"{folder} has not been trained yet: it holds no finished checkpoint; the command that made it "
            "(python -m experiments.train ...) goes on"
        )
    return steps[-1]


def _place(folder: Path, step: int = 0) -> tuple[Path, str]:
    """The Orbax checkpoint of a folder, and what stands before the parameters' names in it."""
    last = newest(folder)
    if (folder / PARAMS).is_dir():
        if step:
            raise ValueError(f"{folder} is a converted model, of step 0, and has no step {step}")
        return folder / PARAMS, ""
    steps = files.committed(folder / "checkpoints")
    if step and step not in steps:
        there = ", ".join(map(str, steps))
        raise ValueError(f"{folder} has no checkpoint of step {step}; those there are of {there}")
    return folder / "checkpoints" / str(step or last) / "state", "params."


def _arrays(folder: Path, step: int, wanted: Collection[str]) -> dict[str, ts.TensorStore]:
    """{path in the parameter tree: the stored array}, opened, nothing read.

    A run that trains a part of the parameters has the others in the folder that it began from, which is
    opened where one of them is among the `wanted` paths.
    """
    own = _own_arrays(folder, step)
    lacking = [path for path in wanted if path not in own]
    if not lacking or (folder / MODEL).is_file():
        return own
    run = config.from_dict(json_file.read(folder / "run.json"))
    if run.optim.train == config.Optim().train:
        return own
    base = _base(folder, run.train)
    return _arrays(base, run.train.init_step, lacking) | own


def _base(folder: Path, train: config.Train) -> Path:
    """The folder that the run in `folder` began from: where it was, or where both were moved to together.

    ValueError, with what can be done, if its weights are not there.
    """
    try:
        check_base(train)
        return Path(train.init_from)
    except ValueError as error:
        for moved in _moved(folder, Path(train.init_from)) if train.init_checksum else ():
            with contextlib.suppress(ValueError):
                check_base(dataclasses.replace(train, init_from=str(moved)))
                return moved
        raise ValueError(
            f"{folder}: its frozen parameters lie in {error}. Bring those weights back there, or to where "
            "they lay as seen from the run, or say where they are in train.init_from of "
            f"{folder / 'run.json'}"
        ) from error


def _moved(folder: Path, base: Path) -> Iterator[Path]:
    """Where a base may be that was moved together with the run in `folder`.

    Below a folder that had both: with /a/runs/base recorded, /b/runs/part finds /b/runs/base.
    """
    for above in dict.fromkeys((*folder.absolute().parents, *folder.resolve().parents)):
        for begin in range(len(base.parts) - 1, 0, -1):
            moved = above.joinpath(*base.parts[begin:])
            if is_native(moved):
                yield moved


def check_base(train: config.Train) -> str:
    """The checksum of the weights that a run begins with. ValueError if they are gone or others."""
    base = Path(train.init_from)
    try:
        if not is_native(base):
            why = "is no model of ours" if base.exists() else "does not exist"
            raise ValueError(f"{base} {why}")
        found = identity(base, train.init_step)
    except (ValueError, OSError) as error:
        raise ValueError(f"train.init_from={train.init_from}: {error}") from error
    if train.init_checksum not in ("", found):
        raise ValueError(
            f"train.init_from={train.init_from}: its weights have the checksum {found}, not "
            f"train.init_checksum={train.init_checksum}"
        )
    return found


def _own_arrays(folder: Path, step: int) -> dict[str, ts.TensorStore]:
    place, prefix = _place(folder, step)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(place).item_metadata
        if metadata is None:
            raise ValueError("its _METADATA or the zarr.json of an array is missing or damaged")
        return {
            leaf.name.removeprefix(prefix).replace(".", "/"): _open(leaf, metadata.use_zarr3)
            for leaf in jax.tree.leaves(metadata.tree)
            if leaf.name.startswith(prefix)
        }
    except Exception as error:  # its metadata are JSON that Orbax does not check
        raise ValueError(f"{place} is not a readable checkpoint ({_line(error)})") from error


def _line(error: Exception) -> str:
    reason = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {reason[0]}"


def _open(leaf: Any, zarr3: bool) -> ts.TensorStore:
    ocdbt = type_handlers.is_ocdbt_checkpoint(leaf.directory)
    context = type_handlers.get_ts_context(use_ocdbt=ocdbt)
    info = type_handlers.ParamInfo(
        name=leaf.name,
        parent_dir=leaf.directory,
        is_ocdbt_checkpoint=ocdbt,
        use_zarr3=zarr3,
        ts_context=context,
    )
    spec = type_handlers.get_json_tspec_read(info, use_ocdbt=ocdbt)
    return ts.open(spec, read=True, open=True, context=context).result()
