"""Model FLOPs: what the mathematics of a training step needs; and those that a program executes.

    FLOPs a token = 6 x N_matmul + 6 x L x N x H x T

N_matmul counts the parameters that a token is multiplied with (no embedding look-up, no norm scales;
a tied output matrix counts). The second term is attention's two products over the causal half of the
square, or over the window. Recomputation does not count (PaLM's convention, arXiv:2204.02311 appendix B,
with the half); MaxText's figure for 7B at T = 2048 is the same to the digit. Of a frozen matrix it is 4
instead of 6, or 2 where the backward pass does not reach it (`per_token`).
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from llama_jax import config, dims, tree
from llama_jax.model import transformer
from llama_jax.model.kernels import SPLASH_BLOCK
from llama_jax.model.transformer import Transformer


def per_token(module: Transformer, seq_len: int, frozen: Collection[str] = ()) -> int:
    """Forward and backward FLOPs of one token in a row of `seq_len`. frozen: paths of what is not trained.

    A matrix takes 2 FLOPs an entry forward, 2 for its own gradient if it is trained, and 2 for the gradient
    of its input if something before it is trained. All blocks need the latter, and attention's backward
    products, as soon as one array of them is trained: that the first block could do without a part is not
    counted.
    """
    matrices, trained = _matrices(module), tree.paths(transformer.letters(module)).keys() - frozen
    first = min(map(_stage, trained))
    total = 0.0
    for path, entries in matrices.items():
        stage = _OUTPUT if path == "embed" else _stage(path)
        passes = 1 + (path in trained) + (first < stage or first == stage == _BLOCKS)
        total += 2 * passes * entries
    blocks = module.config.blocks
    attention = sum(n * ATTENTION[kind](module.config, seq_len) for kind, n in blocks.items())
    return int(total + (attention if first <= _BLOCKS else attention / 3))


def _matrices(module: Transformer) -> dict[str, int]:
    """{path: entries} of the matrices that a token is multiplied with; a tied embedding is one of them."""
    tied = module.config.output == "tied"

    def multiplied(label: str) -> bool:
        output = tied and "vocabulary" in dims.roles(label)
        return dims.is_matrix(label) and (output or not dims.is_table(label))

    labels, shapes = (
        tree.paths(of) for of in (transformer.letters(module), transformer.abstract(module))
    )
    return {path: shapes[path].size for path, label in labels.items() if multiplied(label)}


# The order in which parameters are used: embeddings, blocks, the final norm, the output matrix.
_INPUT, _BLOCKS, _NORM, _OUTPUT = range(4)


def _stage(path: str) -> int:
    last = {"groups": _BLOCKS, "norm": _NORM, "output": _OUTPUT}
    return last.get(path.partition("/")[0], _INPUT)


def _self_attention(model: config.Model, seq_len: int) -> float:
    """Both products of one block, forward and backward, of a token."""
    # Twice the mean number of keys that a query sees: T, or with a window w of T positions 2 w - w^2 / T.
    window = min(model.window or seq_len, seq_len)
    keys = 2 * window - window**2 / seq_len
    return 6 * model.heads * model.head_dim * keys


ATTENTION = {"self": _self_attention}  # by kind of block


class Executed(NamedTuple):
    """FLOPs of matrix products, on all devices together."""

    total: float  # attention kernels by their causal half, as the model FLOPs
    kernels: float  # of the blocks that Pallas kernels visit: the half and the diagonal

    def __add__(self, other):
        return Executed(self.total + other.total, self.kernels + other.kernels)

    def times(self, n: int) -> "Executed":
        return Executed(self.total * n, self.kernels * n)


def executed(jaxpr: Any) -> Executed:
    """What a traced program computes, recomputation included: every product, as often as its loop turns.

    A scan multiplies by its length, a shard_map by its devices; of a while loop one turn counts.
    """
    total = Executed(0, 0)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += Executed(_product(equation), 0)
        elif name == "pallas_call":
            total += _kernel(equation)
        else:
            inner = sum((executed(part) for part in _inside(equation)), Executed(0, 0))
            times = equation.params["length"] if name == "scan" else 1
            times = equation.params["mesh"].size if name == "shard_map" else times
            total += inner.times(times)
    return total


def _inside(equation) -> list[Any]:
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found


def _product(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    width = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted], dtype=float)
    return 2 * width * np.prod(equation.outvars[0].aval.shape, dtype=float)


# Products of T x S x H in each of splash's kernels: scores and output forward; scores, dp and dq; scores,
# dp, dk and dv (arXiv:2205.14135 algorithm 4).
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def _kernel(equation) -> Executed:
    name = str(equation.params["name"])
    products = next((n for part, n in _SPLASH.items() if f"_{part}" in name), None)
    if products is None:
        raise ValueError(f"no count of FLOPs for the kernel {name}")
    # After the tables of the mask, which are integers: queries, then keys; [B,] N, T, H.
    q, k = [v.aval.shape for v in equation.invars if v.aval.dtype.kind in "fV"][:2]
    blocks = q[-2] // math.gcd(q[-2], SPLASH_BLOCK)
    square = products * 2 * np.prod(q, dtype=float) * k[-2]
    return Executed(square / 2, square * (blocks + 1) / (2 * blocks))
