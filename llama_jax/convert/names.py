"""One table: every tensor of a network, its name here, at Meta and at Hugging Face, its layouts.

Layers have the rows of their kind of block (`ROWS`); EMBEDDING, NORM and OUTPUT stand outside of them.

Three layouts. Ours: a stacked array of the letters in `TensorRow.letters`, contracted dimensions first.
Torch's: a matrix [outputs, inputs], as Meta and Hugging Face store it; its letters are `TensorRow.torch`,
heads and head width merged. Between the two lies one transposition. Meta interleaves the pairs that
rotary embedding turns, Hugging Face and we keep them half a head apart: rows of q and k are permuted.
Everything that is converted passes through torch's layout with half-split rows, the hub.

Sources: Meta's llama-models (models/llama3/model.py) and transformers' LlamaForCausalLM for the names.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from llama_jax import config, dims, tree


class TensorRow(NamedTuple):
    """A tensor, or one for every layer of a kind of block.

    In the names `{layer}` stands for its index among all layers, `{number}` for that among those of its kind,
    and in the path `{block}` for its block.
    """

    path: str  # in the parameter tree
    letters: str  # of one layer's array in the tree
    torch: str  # "F D": a matrix [F, D]; "NH D": N and H merged
    meta: str
    hf: str
    split: str  # the letter that Meta's model parallelism spreads; "" for what each shard repeats
    pairs: bool = False  # rows are rotary pairs


EMBEDDING = TensorRow("embed", "VD", "V D", "tok_embeddings", "model.embed_tokens", "V")
NORM = TensorRow("norm/scale", "D", "D", "norm", "model.norm", "")
OUTPUT = TensorRow("output", "DV", "V D", "output", "lm_head", "V")
# Of one layer, by kind of block.
ROWS = {
    "self": tuple(
        TensorRow(
            f"groups/{{block}}/{path}",
            letters,
            torch,
            f"layers.{{number}}.{meta}",
            f"model.layers.{{layer}}.{hf}",
            split,
            pairs,
        )
        for path, letters, torch, meta, hf, split, pairs in (
            ("attention_norm/scale", "D", "D", "attention_norm", "input_layernorm", "", False),
            ("attention/q", "DNH", "NH D", "attention.wq", "self_attn.q_proj", "N", True),
            ("attention/k", "DKH", "KH D", "attention.wk", "self_attn.k_proj", "K", True),
            ("attention/v", "DKH", "KH D", "attention.wv", "self_attn.v_proj", "K", False),
            ("attention/o", "NHD", "D NH", "attention.wo", "self_attn.o_proj", "N", False),
            ("ffn_norm/scale", "D", "D", "ffn_norm", "post_attention_layernorm", "", False),
            ("ffn/gate", "DF", "F D", "feed_forward.w1", "mlp.gate_proj", "F", False),
            ("ffn/up", "DF", "F D", "feed_forward.w3", "mlp.up_proj", "F", False),
            ("ffn/down", "FD", "D F", "feed_forward.w2", "mlp.down_proj", "F", False),
        )
    )
}


class Unit(NamedTuple):
    """One tensor of one layer: what is converted at a time."""

    row: TensorRow
    layer: int  # 0 for a tensor outside the layers
    meta: str
    hf: str
    path: str  # of the array in the parameter tree
    group: int  # its index along L; -1 for an array without L


def units(model: config.Model) -> list[Unit]:
    """Every tensor of a model, in the order of the computation.

    ValueError if a kind of block has no rows.
    """
    found = [unit_of(EMBEDDING, 0, model)]
    for layer in range(model.layers):
        kind = model.pattern[layer % len(model.pattern)]
        found += [unit_of(row, layer, model) for row in config.choose(ROWS, kind, "model.pattern")]
    found.append(unit_of(NORM, 0, model))
    return found if model.output == "tied" else [*found, unit_of(OUTPUT, 0, model)]


def unit_of(row: TensorRow, layer: int, model: config.Model) -> Unit:
    """The tensor of a row of the table in one layer."""
    group, turn = divmod(layer, len(model.pattern))
    kind = model.pattern[turn]
    number = group * model.pattern.count(kind) + model.pattern[:turn].count(kind)
    inside = "{layer}" in row.hf
    return Unit(
        row,
        layer,
        row.meta.format(layer=layer, number=number) + ".weight",
        row.hf.format(layer=layer, number=number) + ".weight",
        row.path.format(block=f"{kind}_{turn}"),
        group if inside else -1,
    )


def torch_shape(row: TensorRow, model: config.Model) -> tuple[int, ...]:
    """The shape of one layer's tensor as Meta and Hugging Face store it."""
    return tuple(math.prod(dims.shape(part, model)) for part in row.torch.split())


def unit_rows(row: TensorRow, model: config.Model) -> int:
    """Rows of torch's matrix that belong together: those of a head."""
    return model.head_dim if row.torch.split()[0][1:] == "H" else 1


def lead(row: TensorRow) -> int:
    """The axis of one layer's array here along which the rows of torch's matrix lie."""
    return row.letters.index(row.torch[0])


def to_ours(rows: np.ndarray, row: TensorRow, model: config.Model) -> np.ndarray:
    """Rows of torch's layout, half-split, as an array of `row.letters`. Whole heads only.

    The letter of `lead` holds what the rows hold; the others are whole.
    """
    size = dims.sizes(model)
    shape = [-1 if letter == row.torch[0] else size[letter] for letter in row.letters]
    return (rows if _same_order(row) else transpose(rows)).reshape(shape)


def to_torch(array: np.ndarray, row: TensorRow, model: config.Model) -> np.ndarray:
    """The inverse of `to_ours`."""
    _, *inputs = row.torch.split()
    if not inputs:
        return array
    width = math.prod(dims.shape(inputs[0], model))
    if _same_order(row):
        return array.reshape(-1, width)
    return transpose(array.reshape(width, -1))


def _same_order(row: TensorRow) -> bool:
    return row.letters == row.torch.replace(" ", "")


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous copy, a cache's worth at a time: six times as fast as NumPy's in one go (LOG.md)."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    # Plain integers: copies of ml_dtypes' bfloat16 go through its own loops.
    source, target = bits(matrix), bits(out)
    for i in range(0, matrix.shape[0], 64):
        for j in range(0, matrix.shape[1], 512):
            target[j : j + 512, i : i + 64] = source[i : i + 64, j : j + 512].T
    return out


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers."""
    return array.view(f"u{array.dtype.itemsize}")


def half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k with Meta's interleaved pairs, in our order: 0, 2, 4, ... then 1, 3, 5, ..."""
    heads = bits(rows).reshape(-1, head_dim // 2, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape).view(rows.dtype)


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `half_split`."""
    heads = bits(rows).reshape(-1, 2, head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape).view(rows.dtype)


def state_dict(params: Any, model: config.Model) -> dict[str, np.ndarray]:
    """Hugging Face's names and arrays for parameters in memory; for small models and tests."""
    arrays = tree.paths(params)
    return {
        unit.hf: to_torch(_of_layer(np.asarray(arrays[unit.path]), unit), unit.row, model)
        for unit in units(model)
    }


def from_state_dict(state: dict[str, np.ndarray], model: config.Model) -> dict[str, Any]:
    """The inverse of `state_dict`: a nested dict of float32 arrays, stacked."""
    layers: dict[str, list[np.ndarray]] = {}
    for unit in units(model):
        array = to_ours(np.asarray(state[unit.hf], np.float32), unit.row, model)
        layers.setdefault(unit.path, []).append(array)
    stacked = {path: np.stack(a) if "groups/" in path else a[0] for path, a in layers.items()}
    return tree.nest(stacked)


def _of_layer(array: np.ndarray, unit: Unit) -> np.ndarray:
    return array if unit.group < 0 else array[unit.group]
