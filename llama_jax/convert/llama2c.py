"""llama2.c's .bin checkpoints: versions 0 (legacy), 1, and 2 (int8 in groups).

The format is karpathy/llama2.c's export.py: version 0 starts with seven int32 (a negative vocabulary
says that the output matrix is there), 1 and 2 with "ak42", the version, the seven and a byte that says
whether the output is shared, padded to 256 bytes. Pairs are interleaved as in Meta's files. Its run.c
fixes norm epsilon 1e-5 and rotary base 10,000, and ends generation at id 1 as at 2: in training each story
begins with 1, and nothing ends it.
"""

import functools
import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax import config
from llama_jax.convert import names
from llama_jax.convert.names import Unit
from llama_jax.convert.source import CheckpointSource, TokenizerFile, naming
from llama_jax.convert.stored import DTYPES, Stored, size
from llama_jax.tokenizer.llama2c import BEGIN, END

MAGIC = 0x616B3432
FLOAT, INT8 = DTYPES["F32"], np.dtype(np.int8)
# What run.c does, in the words that every format here carries.
_GENERATION = {"_from_model_config": True, "bos_token_id": BEGIN, "eos_token_id": [END, BEGIN]}
_NORMS = ("attention_norm/scale", "ffn_norm/scale", "norm/scale")
_MATRICES = ("embed", "q", "k", "v", "o", "gate", "down", "up", "output")
_LEGACY = ("embed", "attention_norm/scale", "q", "k", "v", "o", "ffn_norm/scale", *_MATRICES[5:8])


def open_file(file: Path, tokenizer: TokenizerFile | None) -> CheckpointSource:
    version, model, context, group, at = read_header(file)
    runs = _runs(version, model, context, group, at)
    _check_size(file, model, runs)
    places: dict[str, tuple[Stored, ...]] = {}
    for run in runs:
        if run.row is None:
            _check_rotary(file, model, context, run.start)
            continue
        for layer in range(run.count):
            unit = names.unit_of(run.row, layer, model)
            places[unit.hf] = _place(file, unit, model, group, run.start + layer * run.nbytes)
    return CheckpointSource(
        "llama2c",
        model,
        context,
        dict.fromkeys(places, FLOAT),
        functools.partial(_read, model, places, group),
        lambda unit: file,
        (file,),
        tokenizer,
        carried={"generation_config.json": json.dumps(_GENERATION).encode() + b"\n"},
        notes=(f"llama2.c version {version}{f', int8 in groups of {group}' if group else ''}",),
    )


def read_header(file: Path) -> tuple[int, config.Model, int, int, int]:
    """version, settings, positions, group size (0: not quantised), the byte where the tensors begin."""
    with open(file, "rb") as f:
        raw = f.read(256)
    if len(raw) < 28:
        raise ValueError(f"{file} has {len(raw)} bytes, too few for a llama2.c checkpoint")
    version, at = 0, 28
    if struct.unpack_from("<I", raw)[0] == MAGIC:
        if len(raw) < 256:
            raise ValueError(f"{file} is cut off inside its header")
        version, at = struct.unpack_from("<i", raw, 4)[0], 256
        if version not in (1, 2):
            raise ValueError(
                f"{file}: llama2.c version {version} is not known; 0, 1 and 2 are read"
            )
    sizes = struct.unpack_from("<7i", raw, 8 if version else 0)
    dim, ffn_dim, layers, heads, kv_heads, vocab_size, context = sizes
    tied = raw[36] == 1 if version else vocab_size > 0
    if (
        min(*sizes[:5], abs(vocab_size), context) <= 0
        or dim % heads
        or max(map(abs, sizes)) > 2**24
    ):
        raise ValueError(f"{file} is not a llama2.c checkpoint: its header says {sizes}")
    group = struct.unpack_from("<i", raw, 37)[0] if version == 2 else 0
    if version == 2 and (group <= 0 or dim % group):
        raise ValueError(f"{file}: groups of {group} must divide dim={dim}")
    with naming(file):
        model = config.Model(
            vocab_size=abs(vocab_size),
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim // heads,
            ffn_dim=ffn_dim,
            norm_eps=1e-5,
            output="tied" if tied else "untied",
            compute_dtype="float32",
        )
    return version, model, context, group, at


def _end(path: str) -> str:
    """ "attention/q" and "ffn/gate" by their last word, norms by the last two."""
    words = path.split("/")
    return "/".join(words[-2:]) if words[-1] == "scale" else words[-1]


class _Run(NamedTuple):
    """Tensors of one kind, one behind the other: those of all layers. row None: the rotary tables."""

    row: names.TensorRow | None
    start: int
    nbytes: int  # of one
    count: int


def _runs(version: int, model: config.Model, context: int, group: int, at: int) -> list[_Run]:
    """The whole file by arithmetic: a header may claim millions of layers."""
    rows = (names.EMBEDDING, *names.ROWS["self"], names.NORM, names.OUTPUT)
    by_end = {_end(row.path): row for row in rows}
    order = [*_LEGACY, "norm/scale", "rotary", "output"] if version == 0 else [*_NORMS, *_MATRICES]
    runs = []
    for end in order:
        if end == "output" and model.output == "tied":
            continue
        row = by_end.get(end)
        if row is None:
            nbytes, count = 2 * context * (model.head_dim // 2) * FLOAT.itemsize, 1
        else:
            nbytes = _nbytes(row, model, group)
            count = model.layers if "{layer}" in row.hf else 1
        runs.append(_Run(row, at, nbytes, count))
        at += nbytes * count
    return runs


def _nbytes(row: names.TensorRow, model: config.Model, group: int) -> int:
    shape = names.torch_shape(row, model)
    count = math.prod(shape)
    if not group or len(shape) == 1:
        return count * FLOAT.itemsize
    return count * INT8.itemsize + count // group * FLOAT.itemsize


def _check_size(file: Path, model: config.Model, runs: list[_Run]) -> None:
    length, end = size(file), runs[-1].start + runs[-1].nbytes * runs[-1].count
    if end != length:
        raise ValueError(
            f"{file} should have {end:,} bytes for what its header says, but has {length:,}; "
            f"the first tensor beyond its end is {_beyond(runs, model, length)}"
        )


def _beyond(runs: list[_Run], model: config.Model, length: int) -> str:
    for row, start, nbytes, count in runs:
        if start + nbytes * count > length:
            whole = max(length - start, 0) // nbytes
            return names.unit_of(row, whole, model).hf if row else "a rotary table"
    return "none: there is more behind the last"


def _place(file: Path, unit: Unit, model, group: int, at: int) -> tuple[Stored, ...]:
    shape = names.torch_shape(unit.row, model)
    values = Stored(file, unit.hf, INT8 if group and len(shape) == 2 else FLOAT, shape, at)
    if values.dtype == FLOAT:
        return (values,)
    count = math.prod(shape) // group
    return values, Stored(file, f"{unit.hf} (scales)", FLOAT, (count,), at + values.nbytes)


def _check_rotary(file: Path, model: config.Model, context: int, at: int) -> int:
    """Version 0 holds tables of cosines and sines. They must be those of rotary base 10,000."""
    shape = (context, model.head_dim // 2)
    tables = [Stored(file, name, FLOAT, shape, at) for name in ("rotary cosines", "rotary sines")]
    tables[1] = tables[1]._replace(offset=at + tables[0].nbytes)
    after = tables[1].offset + tables[1].nbytes
    if after <= size(file) and context > 1:
        cos, sin = (table.rows(1, 2)[0] for table in tables)
        inverse = model.rope.theta ** -(np.arange(0, model.head_dim, 2) / model.head_dim)
        given = bool(np.any(sin))  # some writers leave the tables empty: run.c skips them
        if given and not np.allclose([cos, sin], [np.cos(inverse), np.sin(inverse)], atol=1e-4):
            raise ValueError(
                f"{file}: its rotary table has {_base(cos, sin, model)}, but llama2.c computes with 10000"
            )
    return after


def _base(cos: np.ndarray, sin: np.ndarray, model: config.Model) -> str:
    """The rotary base that the second pair's angle at position 1 tells, if it tells one."""
    try:
        angle = math.atan2(float(sin[1]), float(cos[1]))
        return f"base {angle ** (-model.head_dim / 2):.0f}"
    except (IndexError, ZeroDivisionError, OverflowError):
        return "another base"


def _read(model, places, group: int, unit: Unit, start: int, stop: int) -> np.ndarray:
    values, *scales = places[unit.hf]
    rows = values.rows(start, stop)
    if scales:
        # A group may begin in one row and end in the next.
        width = values.shape[1]
        first, last = start * width // group, -(-stop * width // group)
        factors = np.repeat(scales[0].rows(first, last), group)[start * width - first * group :]
        rows = rows * factors[: rows.size].reshape(rows.shape)
    return names.half_split(rows, model.head_dim) if unit.row.pairs else rows
