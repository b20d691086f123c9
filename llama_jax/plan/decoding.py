"""What generating texts takes on a slice: memory, bytes that a token reads, time; no device is needed."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import config, sharding, tree
from llama_jax.analysis import hardware
from llama_jax.decode import engine, sample
from llama_jax.model import cache, transformer
from llama_jax.model.quantised import Quantised, check_blocks, spread
from llama_jax.plan import aot, roofline
from llama_jax.quant import network, rounding
from llama_jax.sharding import Layout

HOP_SECONDS = (
    1e-6  # from a chip to its neighbour, about: "How to Scale Your Model", chapter on TPUs
)


class Texts(NamedTuple):
    """So many at a time, each with room for so many tokens."""

    rows: int
    context: int
    bits: int  # of weights in layers: 16, or as quant/ makes them 8 or 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one token of every text, on one chip. Seconds are estimates, low the fast end of the bracket."""

    slice: str
    devices: int
    fits: bool
    hbm_gib: float
    hbm_limit_gib: float
    weights_gib: float
    cache_gib: float
    read_seconds: float  # weights that products take and cache, once, at the bandwidth of HBM
    compute_seconds: float  # the compiler's cycles
    collective_seconds: float  # bytes and hops, nothing hidden
    step_seconds_low: float
    step_seconds_high: float

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of each text, slow and fast."""
        return 1 / self.step_seconds_high, 1 / self.step_seconds_low


def plan(run: config.Run, name: str, texts: Texts) -> Plan:
    """Of `run.model` on the mesh `run.mesh` over the slice `name`, by TPU's compiler.

    ValueError if it cannot be compiled, DoesNotFit if it does not fit.
    """
    slice_ = hardware.find_slice(name)
    if not slice_.topology:
        raise ValueError(f"{name} is no TPU slice: there is no compiler for it here")
    device = hardware.DEVICES[slice_.device]
    layout = sharding.abstract(run.mesh, slice_.devices)
    _, params, rows = abstract(run.model, layout, texts)
    weights, kept = (_gib_a_device(part) for part in (params, rows.cache))
    compiled = aot.compile(run, name, texts)
    looked_up = 0.0 if run.model.output == "tied" else _gib_a_device(params["embed"])
    read = (weights - looked_up + kept) * 2**30 / (device.hbm_gb_s * 1e9)
    took = roofline.seconds(compiled, slice_)
    collectives = sum(
        one["times"] * (roofline.collective(one, slice_) + hops(one, slice_) * HOP_SECONDS)
        for one in compiled.collectives
    )
    return Plan(
        slice=name,
        devices=slice_.devices,
        fits=compiled.hbm_gib <= device.hbm_gib,
        hbm_gib=compiled.hbm_gib,
        hbm_limit_gib=device.hbm_gib,
        weights_gib=weights,
        cache_gib=kept,
        read_seconds=read,
        compute_seconds=took.compute,
        collective_seconds=collectives,
        step_seconds_low=max(read, took.compute),
        step_seconds_high=max(read, took.compute) + collectives,
    )


def trace(model: config.Model, layout: Layout, texts: Texts) -> Any:
    """The program of one token of every text, traced."""
    module, params, rows = abstract(model, layout, texts)
    return engine.advance.trace(module, params, sample.settings(config.Decode()), rows, 1)


def abstract(model: config.Model, layout: Layout, texts: Texts) -> tuple[Any, Any, engine.Rows]:
    """The network, its parameters and the rows as `engine.Engine` is given them: shapes and places."""
    stacked = transformer.build(model, layout)
    module = transformer.unstacked(stacked)
    number = engine.spread_rows(module, texts.rows)
    slots = engine.places(model, texts.context)
    kept = cache.abstract(module, model.compute_dtype, B=number, S=slots)
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.replicated)  # noqa: E731
    whole = of((number,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), number))
    rows = engine.Rows(kept, whole, whole, of(keys.shape, keys.dtype))
    letters = tree.paths(transformer.letters(stacked))
    params: dict[str, Any] = {}
    for name, leaf in tree.paths(transformer.abstract(stacked)).items():
        layered = name.startswith("groups/")
        own = letters[name][layered:]
        made = _parameter(name, leaf.shape[layered:], own, model.compute_dtype, layout, texts.bits)
        if not layered:
            params[name] = made
        for i in range(model.groups if layered else 0):
            params[name.replace("groups", f"group_{i}", 1)] = made
    return module, tree.nest(params), rows


def _parameter(name, shape, letters: str, dtype: str, layout: Layout, bits: int) -> Any:
    def part(shape, dtype):
        place = layout.param(spread(letters, shape))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    bits, group = network.scheme(letters, config.Quant(bits=bits)) if bits < 16 else (0, 0)
    if not bits:
        return part(shape, dtype)
    blocks = rounding.grid(letters, shape, group).blocks
    check_blocks(layout, letters, blocks, name)
    return Quantised(part(shape, f"int{bits}"), part(blocks, jnp.bfloat16))


def hops(one: dict[str, Any], slice_: hardware.Slice) -> int:
    """Chips that the farthest message of a collective passes, rings along each dimension of the slice."""
    sizes = [int(n) for n in slice_.topology.split(":")[1].split("x")]
    steps, left = 0, max(one["parts"], 1)
    for size in sizes:
        along = math.gcd(size, left)
        steps, left = steps + along - 1, left // along
    return steps * (2 if one["kind"] == "all-reduce" else 1)


def _gib_a_device(part: Any) -> float:
    bytes_ = 0.0
    for leaf in jax.tree.leaves(part):
        bytes_ += math.prod(leaf.sharding.shard_shape(leaf.shape)) * tree.bytes_each(leaf)
    return bytes_ / 2**30
