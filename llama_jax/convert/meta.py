"""Meta's consolidated.NN.pth, one file a model-parallel part, merged as they are read.

Column-parallel matrices (wq, wk, wv, w1, w3, output) are split by rows, row-parallel ones (wo, w2) by
columns; norms are repeated. The embedding is split by columns in LLaMA and Llama 2, by rows in Llama 3
(fairscale's ParallelEmbedding and VocabParallelEmbedding). With more parts than key heads, keys and values
are repeated.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax import config
from llama_jax.convert import meta_params, names, pth
from llama_jax.convert.names import Unit
from llama_jax.convert.source import CheckpointSource, TokenizerFile, compute_dtype, naming
from llama_jax.convert.stored import Stored


def open_folder(folder: Path, tokenizer: TokenizerFile | None, pieces: int) -> CheckpointSource:
    """pieces: the size of the tokenizer's vocabulary, 0 if it is not known."""
    params = meta_params.read(folder / "params.json")
    files = shard_files(folder)
    shards = [pth.read_names(file) for file in files]
    model, notes = model_of(params, shards, pieces, folder)
    parts = {u.hf: _parts(u, model, shards) for u in names.units(model)}
    _check_names(model, shards)
    _check_distinct(model, shards)
    dtypes = {name: stored[0].dtype for name, (stored, _) in parts.items()}
    if params["norm_eps"] == 1e-6 and dtypes["model.embed_tokens.weight"].name == "bfloat16":
        # LLaMA 1's are float16 (meta-llama/llama#771).
        notes += (
            "norm_eps 1e-06 is LLaMA 1's, weights in bfloat16 are Llama 2's: if these are Llama-2-7b-chat as "
            "first published, set norm_eps to 1e-05 in params.json, as Meta did; then it has 4096 positions",
        )
    return CheckpointSource(
        "meta",
        dataclasses.replace(model, compute_dtype=compute_dtype(dtypes)),
        meta_params.context_of(params),
        dtypes,
        functools.partial(_read, model, parts),
        lambda unit: parts[unit.hf][0][0].file,
        (folder / "params.json", *files),
        tokenizer,
        notes=notes,
    )


def shard_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, 01, ...; ValueError if one of the numbers is missing or there twice."""
    numbers = {}
    for file in sorted(folder.glob("consolidated*.pth")):
        number = re.fullmatch(r"consolidated\.(\d+)\.pth", file.name)
        if not number:
            raise ValueError(
                f"{file} is not named like Meta's files, consolidated.00.pth; rename it"
            )
        numbers[file] = int(number[1])
    files = sorted(numbers, key=numbers.__getitem__)
    for wanted, file in enumerate(files):
        if (number := numbers[file]) != wanted:
            found = ", ".join(file.name for file in files)
            raise ValueError(
                f"{folder}: consolidated.{wanted:02}.pth is missing; there are {found}"
                if number > wanted
                else f"{folder}: number {number:02} is there twice: {found}"
            )
    if not files:
        raise ValueError(f"{folder} has no consolidated.00.pth")
    return files


def model_of(
    params: dict, shards: Sequence[Mapping[str, Stored]], pieces: int, folder: Path
) -> tuple[config.Model, tuple]:
    """The settings, from params.json and the shapes; and what was decided on the way."""
    dim, heads, layers = params["dim"], params["n_heads"], params["n_layers"]
    if layers > len(shards[0]):
        raise ValueError(
            f"{folder / 'params.json'}: n_layers={layers} is beyond the {len(shards[0])} tensors that "
            "the files hold"
        )
    if dim % heads:
        raise ValueError(f"{folder / 'params.json'}: n_heads={heads} must divide dim={dim}")
    notes = [f"{len(shards)} model-parallel file{'s' if shards[1:] else ''}"]
    if params.get("vocab_size", -1) == -1 and pieces:
        notes.append(f"vocab_size -1 in params.json: {pieces} pieces of the tokenizer")
    tied = _tied(shards)
    vocab_size, ffn_dim = _vocab_size(params, shards, pieces), _ffn_dim(params, shards)
    with naming(folder / "params.json"):
        rope, note = meta_params.rope_of(params, tied)
        model = config.Model(
            vocab_size=vocab_size,
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=params.get("n_kv_heads") or heads,
            head_dim=params.get("head_dim") or dim // heads,
            ffn_dim=ffn_dim,
            norm_eps=float(params["norm_eps"]),
            rope=rope,
            output="tied" if tied else "untied",
        )
    return model, (*notes, *note)


def _vocab_size(params: dict, shards, pieces: int) -> int:
    embed, count = _first(shards, names.EMBEDDING.meta + ".weight"), len(shards)
    by_columns = count > 1 and embed.shape[1] * count == params["dim"]
    found = embed.shape[0] if by_columns else embed.shape[0] * count
    stated = params.get("vocab_size", -1)
    for said, who in ((stated, "params.json"), (pieces if stated == -1 else -1, "the tokenizer")):
        if said not in (-1, 0, found):
            raise ValueError(
                f"{embed.file}: {embed.name} has {embed.shape[0]} rows in each of {count} file(s), a "
                f"vocabulary of {found}, but {who} has {said}; {_missing(embed.shape[0], count, said)}"
            )
    return found


def _ffn_dim(params: dict, shards) -> int:
    gate, count = _first(shards, _GATE), len(shards)
    found = gate.shape[0] * count
    if "multiple_of" in params and found != (wanted := meta_params.ffn_width(params)):
        raise ValueError(
            f"{gate.file}: {gate.name} has {gate.shape[0]} rows in each of {count} file(s), {found} "
            f"together, but params.json says {wanted}; {_missing(gate.shape[0], count, wanted)}"
        )
    return found


_GATE = "layers.0.feed_forward.w1.weight"


def _first(shards, name: str) -> Stored:
    for shard in shards:
        if name not in shard:
            raise ValueError(f"{_file(shard)} lacks {name}")
    found = shards[0][name]
    if len(found.shape) != 2:
        raise ValueError(f"{found.file}: {name} has shape {list(found.shape)}, not a matrix")
    return found


def _missing(part: int, count: int, wanted: int) -> str:
    if part and wanted % part == 0 and wanted // part > count:
        return f"{wanted // part - count} of {wanted // part} files are missing"
    return "the files do not belong together"


def _tied(shards) -> bool:
    """Whether there is no output matrix beside the embedding's, or a copy; the same in every part."""
    own = ["output.weight" in shard and not _is_copy(shard) for shard in shards]
    if any(own) and not all(own):
        with_it, without = (shards[own.index(has)] for has in (True, False))
        raise ValueError(
            f"{_file(with_it)} has an output.weight of its own and {_file(without).name} has none; "
            "the files do not belong together"
        )
    return not own[0]


def _file(shard: dict[str, Stored]) -> Path:
    return next((tensor.file for tensor in shard.values()), Path("a file without tensors"))


def _is_copy(shard: dict[str, Stored]) -> bool:
    """Tied matrices are saved as one storage under two names; saved again, often as two equal ones."""
    embed, output = shard.get("tok_embeddings.weight"), shard["output.weight"]
    return embed is not None and embed.same(output)


def _parts(unit: Unit, model: config.Model, shards) -> tuple[list[Stored], int]:
    """The parts of a tensor in order, and the axis along which they follow one another."""
    found = []
    for shard in shards:
        if unit.meta not in shard:
            raise ValueError(f"{_file(shard)} lacks {unit.meta}")
        found.append(shard[unit.meta])
    for other in found[1:]:
        if (other.shape, other.dtype) != (found[0].shape, found[0].dtype):
            raise ValueError(
                f"{other.file}: {unit.meta} is {other.dtype}{list(other.shape)}, but "
                f"{found[0].dtype}{list(found[0].shape)} in {found[0].file.name}"
            )
    full, part, count = names.torch_shape(unit.row, model), found[0].shape, len(found)
    if not unit.row.split or count == 1:
        found[0].check_shape(full)
        return found if not unit.row.split else found[:1], 0
    if unit.row.split == "K" and count > model.kv_heads and count % model.kv_heads == 0:
        found = found[:: count // model.kv_heads]
    outputs = unit.row.torch.split()[0]
    axes = (0, 1) if unit.row.path == "embed" else (0 if unit.row.split in outputs else 1,)
    for axis in axes:
        if (
            len(part) == 2
            and part[axis] * len(found) == full[axis]
            and part[1 - axis] == full[1 - axis]
        ):
            return found, axis
    raise ValueError(
        f"{found[0].file}: {unit.meta} has shape {list(part)} in each of {count} files, but together "
        f"they must make {list(full)}; {_missing(part[axes[0]], count, full[axes[0]])}"
    )


def _read(model: config.Model, parts, unit: Unit, start: int, stop: int) -> np.ndarray:
    stored, axis = parts[unit.hf]
    if not unit.row.split:
        rows = stored[0].rows(start, stop)
        for other in stored[1:]:
            if not np.array_equal(names.bits(rows), names.bits(other.rows(start, stop))):
                raise ValueError(
                    f"{other.file}: {unit.meta} differs from {stored[0].file.name}'s; the files do "
                    "not belong together"
                )
    elif axis == 1:
        rows = np.concatenate([part.rows(start, stop) for part in stored], axis=1)
    else:
        height = stored[0].shape[0]
        pieces = []
        for i, part in enumerate(stored):
            a, b = max(start - i * height, 0), min(stop - i * height, height)
            if a < b:
                pieces.append(part.rows(a, b))
        rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return names.half_split(rows, model.head_dim) if unit.row.pairs else rows


def _check_names(model: config.Model, shards) -> None:
    known = {unit.meta for unit in names.units(model)} | {"output.weight"}
    for shard in shards:
        for name, tensor in shard.items():
            if name not in known:
                raise ValueError(f"{tensor.file}: {name} is not a tensor of a text LLaMA")


def _check_distinct(model: config.Model, shards) -> None:
    """One file copied over another would merge without an error of shapes."""
    first = [shard[_GATE] for shard in shards]
    heads = [stored.rows(0, min(16, stored.shape[0])).tobytes() for stored in first]
    for (i, one), (j, other) in itertools.combinations(enumerate(heads), 2):
        if one == other:
            raise ValueError(
                f"{first[j].file} holds the same part as {first[i].file.name}: one is a copy of the "
                "other; fetch it again"
            )
