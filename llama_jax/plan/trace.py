"""The programs that are planned, traced on devices that need not exist: no arrays are made."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import config, tree
from llama_jax.decode import engine, sample
from llama_jax.model import cache, transformer
from llama_jax.model.quantised import Quantised, check_blocks, spread
from llama_jax.quant import network, rounding
from llama_jax.sharding import Layout
from llama_jax.train import program as programs


class Texts(NamedTuple):
    """So many at a time, each with room for so many tokens."""

    rows: int
    context: int
    bits: int  # of weights in layers: 16, or as quant/ makes them 8 or 4


def training(run: config.Run, layout: Layout) -> Any:
    """The training step of a run."""
    program = programs.build(run, layout)
    return program.step.trace(program.state, program.frozen, program.batch)


def decoding(model: config.Model, layout: Layout, texts: Texts) -> Any:
    """One token of every text."""
    module, params, rows = abstract(model, layout, texts)
    return engine.advance.trace(module, params, sample.settings(config.Decode()), rows, 1)


def abstract(
    model: config.Model, layout: Layout, texts: Texts
) -> tuple[Any, Any, engine.BatchSlots]:
    """The network, its parameters and the rows as `engine.Engine` is given them: shapes and places."""
    stacked = transformer.build(model, layout)
    module = transformer.unstacked(stacked)
    number = engine.spread_rows(module, texts.rows)
    slots = engine.places(model, texts.context)
    kept = cache.abstract(module, model.compute_dtype, B=number, S=slots)
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.replicated)  # noqa: E731
    whole = of((number,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), number))
    rows = engine.BatchSlots._make((kept, whole, whole, of(keys.shape, keys.dtype), None))
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
    def part(shape, dtype) -> Any:
        place = layout.param(spread(letters, shape))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    bits, group = network.scheme(letters, config.Quant(bits=bits)) if bits < 16 else (0, 0)
    if not bits:
        return part(shape, dtype)
    blocks = rounding.grid(letters, shape, group).blocks
    check_blocks(layout, letters, blocks, name)
    values: Any = part(shape, f"int{bits}")
    return Quantised(values, scale=part(blocks, jnp.bfloat16))
