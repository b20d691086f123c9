"""Does it fit? Memory of training by formula, before anything is allocated.

Parts, a device: the state and the gradients (exact), what the backward pass finds stored under the
remat policy, and the logits of one chunk with their gradient. Temporary buffers of the compiler are
not counted, so that what is refused here certainly does not fit.
"""

import math
from typing import Any, NamedTuple

import jax
import psutil

from llama_jax import config, tree


class Need(NamedTuple):
    """GiB on each device."""

    state: float  # parameters and optimiser, float32
    gradients: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(self)


def need(run: config.Run, state: Any, shardings: Any, devices: int) -> Need:
    """Memory of a run whose state has these shapes and shardings, on so many devices."""
    model = run.model
    tokens = run.tokens_per_step / run.train.microbatches / devices
    width = 2 if model.compute_dtype == "bfloat16" else 4
    stored = _stored_a_layer(model) * model.layers * width
    logits = 2 * 4 * model.vocab_size / run.train.loss_chunks
    gradients = _gib(state.params, shardings.params) * (2 if run.train.microbatches > 1 else 1)
    return Need(
        state=_gib(state, shardings),
        gradients=gradients,
        activations=tokens * stored / 2**30,
        logits=tokens * logits / 2**30,
    )


def available(devices: list[jax.Device]) -> float:
    """GiB that each device has free; simulated devices share the machine's memory."""
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / 2**30
    return psutil.virtual_memory().available / len(devices) / 2**30


def check(need: Need, available: float) -> None:
    """ValueError with what is needed, what is there, and what to change."""
    if need.total > available:
        raise ValueError(
            f"this run needs at least {need.total:.1f} GiB on each device (parameters and optimiser "
            f"{need.state:.1f}, gradients {need.gradients:.1f}, activations {need.activations:.1f}, "
            f"logits {need.logits:.1f}) but {available:.1f} GiB is free; {_advice(need, available)}"
        )


def _advice(need: Need, available: float) -> str:
    if need.state + need.gradients > available:
        times = math.ceil((need.state + need.gradients) / available)
        return f"use at least {times} times as many devices (mesh.fsdp) or a smaller config"
    largest = max((need.activations, "activations"), (need.logits, "logits"))[1]
    if largest == "logits":
        return "raise train.loss_chunks, or raise train.microbatches"
    return "raise train.microbatches, or set model.remat to 'full'"


def _stored_a_layer(model: config.Model) -> int:
    """Numbers a token that one layer leaves for the backward pass (counted from the layer's code)."""
    attention = model.heads * model.head_dim
    keys = 2 * model.kv_heads * model.head_dim
    return {
        "full": model.dim,
        "attention": model.dim + 2 * attention + keys,
        "linear": 3 * model.dim + attention + keys + 2 * model.ffn_dim,
        "dots": 3 * model.dim + attention + keys + 2 * model.ffn_dim,
    }.get(model.remat, 5 * model.dim + 2 * attention + keys + 4 * model.ffn_dim)


def _gib(shapes: Any, shardings: Any) -> float:
    """GiB that one device holds of a tree."""

    def local(leaf, sharding):
        return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)

    return tree.gib(jax.tree.map(local, shapes, shardings))
