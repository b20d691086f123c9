"""A network to smaller weights: one pass over its parameters, layer after layer."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import config, dims, tree
from llama_jax.model import transformer
from llama_jax.model.context import Context
from llama_jax.model.linear import INPUTS
from llama_jax.model.transformer import Group, Transformer
from llama_jax.quant import rounding
from llama_jax.quant.gptq import gptq


def quantise(
    module: Transformer,
    params: Any,
    quant: config.Quant,
    batches: Sequence[np.ndarray] = (),
    progress: Callable[[], object] = lambda: None,
) -> Any:
    """Parameters (stacked, as `transformer.init` gives them) with every matrix quantised.

    Matrices of layers have `quant.bits`, the embedding and the output matrix 8. batches: tokens [B, T], a
    program for each shape, whose inputs to each matrix "gptq" reads; those of a group of layers come out of
    the quantised groups before it (arXiv:2210.17323 section 4, setup). progress() after each group.

    ValueError if a parameter, or what goes into it, holds a value that is not finite, and if batches are
    given to what reads none, or not given.
    """
    if bool(len(batches)) != quant.reads_text:
        raise ValueError(f"{quant} reads {'a text' if quant.reads_text else 'no text'}")
    module = transformer.portable(module)
    letters = tree.paths(transformer.letters(module))
    outer = {
        name: _parameter(name, w, letters[name], quant)
        for name, w in tree.paths({k: v for k, v in params.items() if k != "groups"}).items()
    }
    single = transformer.unstacked(module)
    states = [_enter(single, tree.nest(outer), jnp.asarray(tokens_BT)) for tokens_BT in batches]
    group = Group(module.config, module.layout)
    done = []
    for i in range(module.config.groups):
        own = jax.tree.map(lambda w: w[i], params["groups"])  # noqa: B023
        hessians: dict[str, jax.Array] = {}
        for x_BTD, context in states:
            found = _hessians(group, own, x_BTD, context)
            hessians = {name: hessians.get(name, 0.0) + h for name, h in found.items()}
        made = {}
        for name, w in tree.paths(own).items():
            of = letters[f"groups/{name}"][1:]
            made[name] = _parameter(f"{name} of group {i}", w, of, quant, hessians.get(name))
        states = [(_go_on(group, tree.nest(made), x, context), context) for x, context in states]
        done.append(jax.block_until_ready(made))
        progress()
    stacked = {
        f"groups/{name}": jax.tree.map(
            lambda *parts: jnp.stack(parts), *(one[name] for one in done)
        )
        for name in done[0]
    }
    return tree.nest({**outer, **stacked})


def scheme(letters: str, quant: config.Quant) -> tuple[int, int]:
    """Bits of a parameter and how many values share a scale, 0: all. (0, 0): it stays as it is.

    Its letters are those without L. A table of positions is small; what has the vocabulary keeps 8 bits.
    """
    if not dims.is_matrix(letters) or "entries" in dims.roles(letters):
        return 0, 0
    return (4, quant.group) if quant.bits == 4 and dims.is_inner(letters) else (8, 0)


def _parameter(name: str, w, letters: str, quant: config.Quant, hessian=None):
    _check_finite(name, w)
    bits, group = scheme(letters, quant)
    if not bits:
        return w
    cut = rounding.grid(letters, w.shape, group)
    if bits == 4 and quant.reads_text:
        _check_finite(f"what goes into {name}", hessian)
        return gptq(w, hessian, cut, bits)
    return dataclasses.replace(rounding.nearest(w, cut, bits), activations=quant.activations)


def _check_finite(name: str, x) -> None:
    if not jnp.isfinite(x).all():
        raise ValueError(f"{name} holds a value that is not finite: it cannot be rounded")


@functools.partial(jax.jit, static_argnames="module")
def _enter(module: Transformer, outer, tokens_BT):
    """What the first group of layers is given: x_BTD and its context."""
    given = []

    def watch(call, args, kwargs, intercepted):
        if isinstance(intercepted.module, Group) and intercepted.method_name == "__call__":
            given.append(args[:2])
            return args[0], None
        return call(*args, **kwargs)

    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    with nn.intercept_methods(watch):
        module.apply({"params": outer}, tokens_BT, positions_BT)
    return given[0]


@functools.partial(jax.jit, static_argnames="group")
def _hessians(group: Group, params, x_BTD, context: Context) -> dict[str, jax.Array]:
    """The sum of x x' over all positions, of what goes into each matrix: {its path: [C, C]}."""
    _, seen = group.apply({"params": params}, x_BTD, context, mutable=[INPUTS])

    def sum_of(x):
        x_XC = x.astype(jnp.float32).reshape(x.shape[0] * x.shape[1], -1)
        return jnp.einsum("XC,XE->CE", x_XC, x_XC, precision="highest")

    return {name: sum_of(x) for name, x in tree.paths(seen[INPUTS]).items()}


@functools.partial(jax.jit, static_argnames="group")
def _go_on(group: Group, params, x_BTD, context: Context):
    return group.apply({"params": params}, x_BTD, context)[0]
