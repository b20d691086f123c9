"""A matrix as whole numbers of 8 or 4 bits, each times the scale of its block, and how to multiply with it.

What quant/ makes of a parameter. It stands in the parameter tree in the place of the array.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# XLA:CPU multiplies whole numbers by a library of its own from two rows on, with one row 20 times as slowly
# (LOG.md). Other backends fill rows up to 8 by themselves.
FEWEST_ROWS = 4
PART = 254  # 16 bits as two numbers of 8, neither beyond 127


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale"],
    meta_fields=["activations"],
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """values * scale, int8 or int4 times bfloat16.

    `scale` has the letters of `values` and along each as many entries as there are blocks, of equal size.
    """

    values: jax.Array
    scale: jax.Array
    activations: str = "compute"  # in which products take what they multiply it with, or "int16"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The matrix."""
        counts = self.scale.shape
        blocks = self.values.reshape(split(self.shape, counts)).astype(dtype)
        scale = self.scale.reshape(split(counts, counts))
        return (blocks * scale.astype(dtype)).reshape(self.shape)


def split(shape: tuple[int, ...], blocks: tuple[int, ...]) -> list[int]:
    """The shape with each dimension as two: its blocks, and what is within one."""
    return [n for size, count in zip(shape, blocks, strict=True) for n in (count, size // count)]


def spread(letters: str, shape: tuple[int, ...]) -> str:
    """The letters of scales, for sharding: along a dimension of one block there is nothing to spread."""
    return "".join(x if size > 1 else "H" for x, size in zip(letters, shape, strict=True))


def check_blocks(layout: Any, letters: str, blocks: tuple[int, ...], name: str) -> None:
    """ValueError if a matrix is cut into a number of blocks that the mesh does not divide."""
    try:
        layout.check(blocks, spread(letters, blocks), name)
    except ValueError:
        axes = ", ".join(f"{axis}={n}" for axis, n in layout.mesh.shape.items() if n > 1)
        raise ValueError(
            f"{name}: its {list(blocks)} blocks, one scale each, do not spread evenly over the mesh {axes}; "
            "take weights of a smaller quant.group, or another mesh"
        ) from None


def product(letters: str, x: jax.Array, w: Quantised, dtype: DTypeLike | None = None) -> jax.Array:
    """`einsum(letters, x, w)` in the dtype of x, or another. w begins with the contracted letters.

    Of blocks that are whole channels the result is scaled, not the matrix. With `activations` "int16" x is
    rounded, too, by its largest entry at each position, and whole numbers are multiplied.
    """
    inputs, weights, outputs = letters.replace("->", ",").split(",")
    contracted = "".join(letter for letter in weights if letter in inputs)
    dtype, sums = dtype or x.dtype, jnp.float32
    if math.prod(w.scale.shape[: len(contracted)]) > 1:
        out = jnp.einsum(letters, x, w.dense(x.dtype), preferred_element_type=sums)
        return out.astype(dtype)
    free = dict(zip(weights, w.scale.shape, strict=True))
    scale = w.scale.reshape([1 if letter in inputs else free[letter] for letter in outputs])
    if w.activations == "compute":
        out = jnp.einsum(letters, x, w.values.astype(x.dtype), preferred_element_type=sums)
        return (out * scale.astype(sums)).astype(dtype)
    x = jnp.einsum(f"{inputs}->BT{contracted}", x)
    B, T, *widths = x.shape
    rows, matrix = (
        x.astype(sums).reshape(B * T, math.prod(widths)),
        w.values.reshape(math.prod(widths), -1),
    )
    out = _whole_product(rows, matrix).reshape(B, T, *w.shape[len(contracted) :])
    out = jnp.einsum(f"BT{weights[len(contracted) :]}->{outputs}", out)
    return (out * scale.astype(sums)).astype(dtype)


def _whole_product(x_XC, values_CO):
    """float32 x @ values, each row of x in 16 bits: two products of whole numbers of 8."""
    step_X1 = jnp.maximum(jnp.max(jnp.abs(x_XC), axis=-1, keepdims=True), 1e-30) / (127 * PART)
    whole_XC = jnp.round(x_XC / step_X1)
    high_XC = jnp.round(whole_XC / PART)
    parts = jnp.concatenate([high_XC, whole_XC - PART * high_XC]).astype(jnp.int8)
    X = len(x_XC)
    parts = jnp.pad(parts, ((0, max(FEWEST_ROWS - 2 * X, 0)), (0, 0)))
    sums = jnp.dot(parts, values_CO, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (PART * sums[:X] + sums[X : 2 * X]) * step_X1
