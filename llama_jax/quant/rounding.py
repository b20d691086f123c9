"""A matrix to whole numbers: which values share a scale, the scale, the nearest numbers."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import dims
from llama_jax.model.quantised import Quantised, split

STEPS = {8: 127, 4: 8}  # from 0 to the largest
SHRINK = 24  # scales that are tried for a block of 4 bits, of either sign


class Grid(NamedTuple):
    """How a matrix is cut: its contracted letters come first, `blocks` says how many along each letter."""

    contracted: int  # letters
    blocks: tuple[int, ...]


def grid(letters: str, shape: tuple[int, ...], group: int) -> Grid:
    """Blocks of `group` values that are multiplied with the same entries of x and added up.

    Of another size where that does not divide them: the nearest ratio that does, not below half of it,
    where scales would take as much as values. group 0: of all. A table's row is a block.
    """
    if dims.is_table(letters):
        return Grid(0, (shape[0], 1))
    contracted = max(letters.index(dims.width(letters)), 1)
    outer, inner = math.prod(shape[: contracted - 1]), shape[contracted - 1]
    sizes = divisors(inner) + [inner * n for n in divisors(outer)]
    wanted = min(group or outer * inner, outer * inner)
    size = min((n for n in sizes if 2 * n >= wanted), key=lambda n: abs(math.log(n / wanted)))
    counts = [max(outer * inner // max(size, inner), 1), max(inner // size, 1)]
    return Grid(contracted, (*counts[2 - contracted :], *shape[contracted:]))


@functools.partial(jax.jit, static_argnames=("cut", "bits"))
def nearest(w: jax.Array, cut: Grid, bits: int) -> Quantised:
    """Each value to the nearest number: values of the shape of w, one scale a block."""
    blocks = w.astype(jnp.float32).reshape(split(w.shape, cut.blocks))
    scale = best_scale(blocks, 1.0, tuple(range(1, blocks.ndim, 2)), bits)
    values = whole(blocks, scale, bits).reshape(w.shape)
    return Quantised(values.astype(f"int{bits}"), scale.reshape(cut.blocks).astype(jnp.bfloat16))


def best_scale(
    blocks: jax.Array, importance: jax.Array | float, axes: tuple[int, ...], bits: int
) -> jax.Array:
    """float32 that bfloat16 holds: of 8 bits the largest value over 127.

    Of 4 bits that which gives the least sum of importance * error^2, among `SHRINK` of either sign: 16
    numbers, -8 to 7, lie to one side by one.
    """
    largest = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1.0)
    exact = lambda scale: scale.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    if bits == 8:
        # Up, if rounding took it down: else the largest value would not be reached.
        return exact(largest * (1 + 2.0**-8) / STEPS[8])

    def error(scale):
        missed = blocks - scale * whole(blocks, scale, bits)
        return jnp.sum(importance * jnp.square(missed), axis=axes, keepdims=True)

    def better(best, share):
        scale = exact(largest * share / STEPS[4])
        found = error(scale)
        return jax.tree.map(
            lambda a, b: jnp.where(found < best[0], a, b), (found, scale), best
        ), None

    shares = jnp.linspace(0.6, 1.15, SHRINK)
    none = (jnp.full_like(largest, jnp.inf), largest)
    (_, scale), _ = jax.lax.scan(better, none, jnp.concatenate([shares, -shares]))
    return scale


def whole(values: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """float32 whole numbers: the nearest to values / scale that there are."""
    steps = STEPS[bits]
    return jnp.clip(jnp.round(values / scale), -steps, min(steps, 2 ** (bits - 1) - 1))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
