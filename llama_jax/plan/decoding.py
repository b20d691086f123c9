"""What generating texts takes on a slice: memory, bytes that a token reads, time; no device is needed."""

import dataclasses
import math
from typing import Any

import jax

from llama_jax import config, sharding, tree
from llama_jax.analysis import hardware
from llama_jax.plan import aot, roofline, trace
from llama_jax.plan.hlo import Collective
from llama_jax.plan.trace import Texts

HOP_SECONDS = (
    1e-6  # from a chip to its neighbour, about: "How to Scale Your Model", chapter on TPUs
)


@dataclasses.dataclass(frozen=True)
class DecodingPlan:
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


def plan(run: config.Run, name: str, texts: Texts) -> DecodingPlan:
    """Of `run.model` on the mesh `run.mesh` over the slice `name`, by TPU's compiler.

    ValueError if it cannot be compiled, DoesNotFit if it does not fit.
    """
    slice_ = hardware.find_slice(name)
    if not slice_.topology:
        raise ValueError(f"{name} is no TPU slice: there is no compiler for it here")
    device = hardware.DEVICES[slice_.device]
    layout = sharding.abstract(run.mesh, slice_.devices)
    _, params, rows = trace.abstract(run.model, layout, texts)
    weights, kept = (_gib_a_device(part) for part in (params, rows.cache))
    compiled = aot.compile(run, name, texts)
    looked_up = 0.0 if run.model.output == "tied" else _gib_a_device(params["embed"])
    read = (weights - looked_up + kept) * 2**30 / (device.hbm_gb_s * 1e9)
    took = roofline.seconds(compiled, slice_)
    collectives = sum(
        one.times * (roofline.collective(one, slice_) + hops(one, slice_) * HOP_SECONDS)
        for one in compiled.collectives
    )
    return DecodingPlan(
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


def hops(one: Collective, slice_: hardware.Slice) -> int:
    """Chips that the farthest message of a collective passes, rings along each dimension of the slice."""
    sizes = [int(n) for n in slice_.topology.split(":")[1].split("x")]
    steps, left = 0, max(one.parts, 1)
    for size in sizes:
        along = math.gcd(size, left)
        steps, left = steps + along - 1, left // along
    return steps * (2 if one.kind == "all-reduce" else 1)


def _gib_a_device(part: Any) -> float:
    bytes_ = 0.0
    for leaf in jax.tree.leaves(part):
        bytes_ += math.prod(leaf.sharding.shard_shape(leaf.shape)) * tree.bytes_each(leaf)
    return bytes_ / 2**30
