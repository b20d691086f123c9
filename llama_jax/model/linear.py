"""A linear layer: its matrix, and an einsum whose gradient is cheap on every backend."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax import dims
from llama_jax.model.init import initial, param
from llama_jax.model.quantised import Quantised, product

INPUTS = "inputs"  # the collection that takes what goes into each matrix, when it is asked for


def linear(module: nn.Module, name: str, letters: str, x: jax.Array, role: str) -> jax.Array:
    """`einsum(letters, x, w)`, w the parameter `name`, which begins with the contracted letters.

    "BNTH,NHD->BTD". Roles: see `init.initial`.
    """
    inputs, weights, outputs = letters.replace("->", ",").split(",")
    w = param(module, name, weights, initial(module.config, role))
    if module.is_mutable_collection(INPUTS) and not module.is_initializing():
        rows, contracted = _rows_and_contracted(inputs, weights)
        module.put_variable(INPUTS, name, jnp.einsum(f"{inputs}->{rows}{contracted}", x))
    if isinstance(w, Quantised):
        return module.layout.made(product(letters, x, w), outputs)
    one_device = module.layout.mesh.size == 1
    product_of = _on_one_device if one_device else _across_devices
    out = module.layout.made(product_of(letters, x, w, module.layout), outputs)
    return checkpoint_name(out, "linear")


def _on_one_device(letters, x, w, layout):
    """B and T (M of a memory) are merged first.

    With two contracted dimensions XLA:CPU writes a transposed copy of every activation for the gradient
    of w, a fifth of the step (LOG.md).
    """
    inputs, weights, outputs = letters.replace("->", ",").split(",")
    rows, contracted = _rows_and_contracted(inputs, weights)
    free = weights[len(contracted) :]
    x = jnp.einsum(f"{inputs}->{rows}{contracted}", x)
    B, T, *widths = x.shape
    width = math.prod(widths)
    out = x.reshape(B * T, width) @ w.reshape(width, -1)
    out = out.reshape(B, T, *w.shape[len(contracted) :])
    return jnp.einsum(f"{rows}{free}->{outputs}", out)


def _rows_and_contracted(inputs: str, weights: str) -> tuple[str, str]:
    """The letters of x that the matrix does not have, such as "BT", and those that it is contracted along."""
    rows = "".join(letter for letter in inputs if letter not in weights)
    return rows, "".join(letter for letter in weights if letter in inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _across_devices(letters, x, w, layout):
    """B and T are sharded apart and stay apart."""
    return jnp.einsum(letters, x, w)


def _forward(letters, x, w, layout):
    return jnp.einsum(letters, x, w), (x, w)


def _backward(letters, layout, saved, slope):
    """The gradient of w begins with its narrow letter (D), unless that is its wider side.

    What belongs to the first side is transposed on a TPU: written as FD, the gradient of `down` has every
    hidden activation copied, 1% of 7B's step. And D is scattered: written as NHD, the gradient of `o` is
    all-reduced in full where heads are sharded, too.
    """
    x, w = saved
    inputs, weights, outputs = letters.replace("->", ",").split(",")
    narrow = dims.width(weights)
    width = w.shape[weights.index(narrow)]
    other = weights.replace(narrow, "")
    order = narrow + other if w.size >= width**2 else other + narrow
    w_slope = layout.rest(jnp.einsum(f"{inputs},{outputs}->{order}", x, slope), order)
    x_slope = jnp.einsum(f"{outputs},{weights}->{inputs}", slope, w)
    return x_slope, jnp.einsum(f"{order}->{weights}", w_slope)


_across_devices.defvjp(_forward, _backward)
