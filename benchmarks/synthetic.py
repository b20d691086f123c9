"""Checkpoints of random weights in Meta's format, in any number of model-parallel parts.

python -m benchmarks.synthetic --to=DIR --gb=1 --parts=2
"""

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax import config
from llama_jax.convert import meta_params, names, pth_plan
from llama_jax.convert.names import Unit


def write(folder: Path, model: config.Model, parts: int, dtype: np.dtype, seed: int = 0) -> None:
    """consolidated.NN.pth and params.json; the tensors of `tensor(unit, model, seed)`, split."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(meta_params.params_of(model)))
    tied = {"output.weight": "tok_embeddings.weight"} if model.output == "tied" else {}
    for part in range(parts):
        shapes = {
            unit.meta: (dtype, split(unit, model, parts, part, None)) for unit in names.units(model)
        }
        plan, sums = pth_plan.plan(shapes, tied), {}
        with open(folder / f"consolidated.{part:02}.pth", "wb") as file:

            def put(member, content, file=file, sums=sums):
                sums[member] = zlib.crc32(content)
                file.seek(member.start)
                file.write(pth_plan.header(member, sums[member]))
                file.write(content)

            for member, content in plan.small.items():
                put(member, content)
            for unit in names.units(model):
                whole = tensor(unit, model, dtype, seed)
                piece = np.ascontiguousarray(split(unit, model, parts, part, whole))
                put(plan.tensors[unit.meta], piece.reshape(-1).view(np.uint8))
            file.seek(plan.end)
            file.write(pth_plan.index(sums, plan.end))


def tensor(unit: Unit, model: config.Model, dtype: np.dtype, seed: int) -> np.ndarray:
    """A random tensor in Meta's layout, the same for the same unit."""
    key = zlib.crc32(unit.meta.encode())
    shape = names.torch_shape(unit.row, model)
    bits = np.random.default_rng([seed, key]).integers(
        0, 2 ** (8 * dtype.itemsize), shape, f"u{dtype.itemsize}"
    )
    # The second bit of the exponent is cleared: no NaN, no infinity, magnitudes below 2.
    return (bits & ~np.array(1 << (8 * dtype.itemsize - 2), bits.dtype)).view(dtype)


def split(unit: Unit, model: config.Model, parts: int, part: int, whole: np.ndarray | None) -> Any:
    """One part of a tensor, or its shape where there is none: rows, columns, or all of it."""
    shape = names.torch_shape(unit.row, model)
    outputs = unit.row.torch.split()[0]
    if not unit.row.split or parts == 1:
        axis, size = 0, shape[0]
    else:
        axis = 0 if unit.row.split in outputs else 1
        size = shape[axis] // parts
    cut = slice(part * size, (part + 1) * size) if size < shape[axis] else slice(None)
    index = (cut,) if axis == 0 else (slice(None), cut)
    if whole is None:
        return tuple(size if i == axis else n for i, n in enumerate(shape))
    return whole[index]


def of_size(gigabytes: float) -> config.Model:
    """A network of Llama's proportions whose bfloat16 weights fill so many GB."""
    dim, ffn_dim, vocab_size = 2048, 5632, 32_000
    layer = 2 * dim * dim + 2 * dim * dim // 4 + 3 * dim * ffn_dim
    layers = max(round((gigabytes * 1e9 / 2 - 2 * vocab_size * dim) / layer), 1)
    return config.Model(
        vocab_size=vocab_size,
        dim=dim,
        layers=layers,
        heads=16,
        kv_heads=4,
        head_dim=128,
        ffn_dim=ffn_dim,
        norm_eps=1e-5,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--parts", type=int, default=2)
    given = parser.parse_args()
    write(given.to, of_size(given.gb), given.parts, np.dtype(ml_dtypes.bfloat16))
