"""How long a compiled step takes, as a bracket: nothing here has run.

The fast end counts the compiler's cycles alone, but no more FLOPs a second than the peak. The slow end adds
what has no cycles: Pallas kernels at half the peak rate, collectives for as long as no scheduled work covers
them, and what is sent to the host and back. Published Llama-2-70B on v5p-128 (65.4% MFU) lies between 68% and
60% so computed.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_jax.analysis import hardware
from llama_jax.plan.aot import Compiled

KERNEL_RATE = 0.5  # of the peak
HOST_GB_S = 16.0  # a chip's share of the PCIe bus of its host, one way: assumed


class Seconds(NamedTuple):
    """Of one step."""

    compute: float
    kernels: float
    exposed: float  # collectives that nothing covers
    host: float  # activations that are kept there, there and back
    at_peak: float  # every product that is computed, at the peak rate

    @property
    def low(self) -> float:
        return max(self.compute, self.at_peak)

    @property
    def high(self) -> float:
        return self.compute + self.kernels + self.exposed + self.host


def seconds(compiled: Compiled, slice_: hardware.Slice, offloaded: float = 0.0) -> Seconds:
    """`offloaded` are the bytes that a device sends to its host in a step."""
    device = hardware.DEVICES[slice_.device]
    clock = device.ghz * 1e9
    return Seconds(
        sum(compiled.cycles.values()) / clock,
        compiled.kernel_flops / (KERNEL_RATE * device.bf16_tflops * 1e12),
        sum(one["times"] * exposed(one, slice_, clock) for one in compiled.collectives),
        host(offloaded),
        compiled.flops / (device.bf16_tflops * 1e12),
    )


def host(offloaded: float) -> float:
    """Seconds in which so many bytes are sent to the host and read back."""
    return 2 * offloaded / (HOST_GB_S * 1e9)


def exposed(one: Mapping[str, Any], slice_: hardware.Slice, clock: float) -> float:
    """Seconds of one collective that no work scheduled beside it covers."""
    return max(0.0, collective(one, slice_) - one["covered"] / clock)


def collective(one: Mapping[str, Any], slice_: hardware.Slice) -> float:
    """Seconds of one collective by itself, on rings over the links that its group has.

    Between slices the compiler makes sends, through the data centre's network, and receives, which come
    the other way meanwhile. Of GPUs `one["apart"]` is the distance of neighbours in the group, in the order
    of devices, which fills one node after another.
    """
    device, parts = hardware.DEVICES[slice_.device], max(one["parts"], 2)
    if one["kind"] == "send":
        return one["bytes"] / (device.dcn_gb_s * 1e9)
    if one["kind"] == "recv":
        return 0.0
    link = device.link_gb_s * 1e9
    if one["kind"] == "collective-permute":
        return one["bytes"] / link
    share = (parts - 1) / parts * (2 if one["kind"] == "all-reduce" else 1)
    if not slice_.topology:
        return one["bytes"] * share / (1e9 * between_gpus(device, parts, one["apart"]))
    return one["bytes"] * share / (link * links(slice_.topology, parts))


def between_gpus(device: hardware.Device, parts: int, apart: int) -> float:
    """GB/s of each GPU in a group: NVLink's within a node; beyond it rings enter and leave a node through
    the network ports of all its GPUs that are in the group."""
    if parts * apart <= hardware.GPUS_PER_NODE:
        return device.link_gb_s
    return min(device.link_gb_s, device.dcn_gb_s * max(hardware.GPUS_PER_NODE // apart, 1))


def links(topology: str, parts: int) -> int:
    """Links of a chip along the dimensions that a group of so many chips spans; 2 where they wrap."""
    kind, shape = topology.split(":")
    sizes = [int(n) for n in shape.split("x")]
    spans = [
        subset
        for n in range(1, len(sizes) + 1)
        for subset in itertools.combinations(sizes, n)
        if math.prod(subset) >= parts
    ]
    subset = min(spans or [tuple(sizes)], key=lambda s: (math.prod(s), len(s)))
    cube = len(sizes) == 3 and all(size % 4 == 0 for size in sizes)
    wraps = lambda size: cube or (kind in ("v5e", "v6e") and size == 16)  # noqa: E731
    return sum(2 if wraps(size) else 1 for size in subset if size > 1) or 1
