"""Does it fit? Memory of training by formula, before anything is allocated.

A device holds the state, and at the peak of a step either the logits of one chunk with their gradient, or
the gradients and the work of one layer's backward pass; and what that pass finds stored under the remat
policy. State and gradients are exact. The work of a layer is counted in arrays of the layer's code, as many
as the TPU compiler was found to keep at once (WORK below); elsewhere it is left out, so that what is
refused there certainly does not fit.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import psutil

from llama_jax import config
from llama_jax.model.kernels import BLOCK, IN_ORDER_FROM
from llama_jax.sharding import Layout


class Need(NamedTuple):
    """GiB on each device."""

    state: float  # parameters and optimiser, float32; frozen parameters
    gradients: float
    activations: float
    logits: float
    work: float = 0.0

    @property
    def total(self) -> float:
        return self.state + self.activations + max(self.logits, self.gradients + self.work)


class Work(NamedTuple):
    """Arrays that exist at once in the backward pass of a layer, on one generation of TPU."""

    weights: float  # times the layer's gathered parameters
    wide: float  # times tokens x ffn width
    narrow: float  # times tokens x (model width + attention width)
    gathered: float  # times tokens x model width, where heads and widths are over tensor


# Solved from compiled steps; docs/scale.md compares them all with what it gives.
WORK = {
    "TPU v2": Work(1.1, 7.7, 0.0, 0.0),
    "TPU v3": Work(1.1, 7.7, 0.0, 0.0),
    "TPU v4": Work(2.1, 3.5, 4.4, 6.2),
    "TPU v5": Work(2.1, 3.5, 4.4, 6.2),
    "TPU v5 lite": Work(0.3, 6.3, 2.8, 2.9),
    "TPU v6 lite": Work(0.3, 6.3, 2.8, 2.9),
    "TPU7x": Work(0.3, 6.3, 2.8, 2.9),
}
SCORES = 3.1  # times the float32 scores that attention in blocks holds at once, on TPUs
LANES = 128  # the last dimension of an array takes a multiple of it in a TPU's memory


def need(
    run: config.Run, layout: Layout, state: Any, device_kind: str = "", frozen: Any = ()
) -> Need:
    """Memory of a run whose state and frozen arrays have these shapes and shardings."""
    return of_bytes(run, layout, _local((state, frozen)), _local(state.params), device_kind)


def of_bytes(
    run: config.Run, layout: Layout, state: float, parameters: float, device_kind: str
) -> Need:
    """The same from the bytes on one device: of the state with what is frozen, and of trained parameters."""
    model = run.model
    if device_kind.startswith("TPU"):
        model = padded(model)
    width = 2 if model.compute_dtype == "bfloat16" else 4
    rows, wide = layout.row_parts, layout.wide.parts
    # Of wide arrays a device has a part, of narrow ones some tokens.
    own = run.tokens_per_step / run.train.microbatches / (rows * layout.position_parts)
    gathered = width * model.vocab_size * model.dim / wide
    logits = own / run.train.loss_chunks * model.vocab_size * (4 + width)
    in_compute_dtype = parameters * width / 4
    across = layout.mesh.size > 1
    return Need(
        state=state / 2**30,
        gradients=(in_compute_dtype + parameters * (run.train.microbatches > 1)) / 2**30,
        activations=own * stored(model) * width / 2**30,
        logits=(logits + across * 2 * gathered) / 2**30,
        work=(
            _work(model, own, width, wide, WORK.get(device_kind), run.data.seq_len)
            + _bias(run, rows, width)
        )
        / 2**30,
    )


def available(devices: Sequence[Any]) -> float:
    """GiB that each device has free; simulated devices share the machine's memory."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    stats = here[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / 2**30
    return psutil.virtual_memory().available / len(here) / 2**30


def check(need: Need, available: float) -> None:
    """ValueError with what is needed, what is there, and what to change."""
    if need.total > available:
        raise ValueError(
            f"this run needs at least {need.total:.1f} GiB on each device (parameters and optimiser "
            f"{need.state:.1f}, gradients {need.gradients:.1f}, activations {need.activations:.1f}, "
            f"logits {need.logits:.1f}, work of a layer {need.work:.1f}) but {available:.1f} GiB is free; "
            f"{advice(need, available)}"
        )


def advice(need: Need, available: float) -> str:
    if need.state + need.gradients > available:
        times = math.ceil((need.state + need.gradients) / available)
        return f"use at least {times} times as many devices (mesh.fsdp) or a smaller config"
    largest = max((need.activations, "activations"), (need.logits, "logits"), (need.work, "work"))[
        1
    ]
    if largest == "logits":
        return "raise train.loss_chunks, or raise train.microbatches"
    if largest == "work":
        return "raise train.microbatches"
    return "raise train.microbatches, or set model.remat to 'full'"


def padded(model: config.Model) -> config.Model:
    """With heads as wide as they lie in a TPU's memory."""
    return dataclasses.replace(model, head_dim=math.ceil(model.head_dim / LANES) * LANES)


def stored(model: config.Model) -> int:
    """Numbers a token that the layers leave for the backward pass."""
    return sum(n * STORED[kind](model) for kind, n in model.blocks.items())


def _stored_by_self(model: config.Model) -> int:
    """By one block, counted from its code."""
    attention = model.heads * model.head_dim
    keys = 2 * model.kv_heads * model.head_dim
    return {
        "full": model.dim,
        "offload": model.dim,
        "attention": model.dim + 2 * attention + keys,
        "linear": 2 * model.dim + 2 * attention + keys + 2 * model.ffn_dim,
        "dots": 2 * model.dim + attention + keys + 2 * model.ffn_dim,
        # Of the four wide arrays XLA computes one again.
        "none": 5 * model.dim + 2 * attention + keys + 3 * model.ffn_dim,
    }[model.remat]


STORED = {"self": _stored_by_self}  # by kind of block


def offloaded(run: config.Run, devices: int) -> float:
    """Bytes that each device sends to its host in a step, and reads back, under remat 'offload'."""
    model = run.model
    if model.remat != "offload":
        return 0.0
    attention, keys = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    width = 2 if model.compute_dtype == "bfloat16" else 4
    numbers = 2 * attention + keys + 2 * model.ffn_dim
    return run.tokens_per_step / devices * model.layers * numbers * width


def _work(
    model: config.Model, tokens: float, width: int, wide: int, work: Work | None, seq_len: int
) -> float:
    if work is None:
        return 0.0
    attention, keys = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    weights = model.dim * (2 * attention + keys + 3 * model.ffn_dim) / wide
    narrow = model.dim + attention + keys
    arrays = work.wide * model.ffn_dim + work.narrow * narrow
    arrays += (wide > 1) * wide * work.gathered * model.dim
    # Half the square at once, or a block of its rows (kernels.py).
    seen = seq_len / 2 if seq_len <= IN_ORDER_FROM else BLOCK
    scores = 4 * tokens * model.heads * seen if model.kernel == "blockwise" else 0
    return width * (work.weights * weights + tokens * arrays) + SCORES * scores


def _bias(run: config.Run, rows: int, width: int) -> float:
    """Bytes of [B, 1, T, T], as which cuDNN's kernel takes a mask that hides other documents."""
    if run.model.kernel != "cudnn" or run.data.segments != "document":
        return 0.0
    return run.train.batch_size / run.train.microbatches / rows * run.data.seq_len**2 * width


def _local(shapes: Any) -> float:
    """Bytes that one device holds of a tree."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )
