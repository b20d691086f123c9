"""How long a compiled step takes, as a bracket: nothing here has run.

The estimate adds four times: the compiler's cycles, at the rate at which the generation was found to work
them off; attention kernels, which have no cycles, at a share of the peak; collectives, for as long as no
scheduled work covers them; and what is sent to the host and back. The bracket is a factor of SPREAD around
it, but never faster than every product at the peak rate. docs/scale.md holds it against published runs.
"""

import itertools
import math
from typing import NamedTuple

from llama_jax.analysis import hardware
from llama_jax.plan.hlo import Collective, Compiled

SPREAD = 1.16  # from the estimate to either end: high over low is 1.35
HOST_GB_S = 16.0  # a chip's share of the PCIe bus of its host, one way: assumed


class ChipRates(NamedTuple):
    """Of one generation."""

    slower: float  # seconds of a step's scheduled cycles over those cycles at the clock's rate
    kernel: float  # FLOPs a second of attention kernels over the peak


# kernel: splash is taken to reach 0.6 of the peak where a matrix unit is 128 wide, as a head is, and little
# more than half of that where it is 256 wide and a head fills half of it (v6e, v7x); no figure of it alone is
# published. slower: of v5p and v6e solved from one published run each (docs/scale.md, "fitted"; v5p's came
# out as 0.97, and nothing is faster than its clock). Of v7x measured: a product of 16,384 runs at 950
# TFLOP/s, the compiler's cycles say 1,078 (accelerator-microbenchmarks, Ironwood, GEMM results).
RATES = {
    "TPU v5": ChipRates(1.0, 0.6),
    "TPU v6 lite": ChipRates(1.09, 0.35),
    "TPU7x": ChipRates(1.13, 0.35),
}
USUAL = ChipRates(1.05, 0.6)  # of generations of which nobody published a run of LLaMA: assumed


class Seconds(NamedTuple):
    """Of one step."""

    compute: float  # the compiler's cycles at the clock's rate
    slower: float  # ChipRates.slower
    kernels: float
    exposed: float  # collectives that nothing covers
    host: float  # activations that are kept there, there and back
    at_peak: float  # every product that is computed, at the peak rate

    @property
    def on_device(self) -> float:
        return self.compute * self.slower + self.kernels + self.exposed

    @property
    def low(self) -> float:
        """Copies to the host hide behind all else."""
        return max(self.on_device / SPREAD, self.host / SPREAD, self.at_peak)

    @property
    def high(self) -> float:
        return (self.on_device + self.host) * SPREAD


def seconds(compiled: Compiled, slice_: hardware.Slice, offloaded: float = 0.0) -> Seconds:
    """`offloaded` are the bytes that a device sends to its host in a step."""
    device, rates = hardware.DEVICES[slice_.device], RATES.get(slice_.device, USUAL)
    clock = device.ghz * 1e9
    return Seconds(
        compute=sum(compiled.cycles.values()) / clock,
        slower=rates.slower,
        kernels=compiled.kernel_flops / (rates.kernel * device.bf16_tflops * 1e12),
        exposed=sum(one.times * exposed(one, slice_, clock) for one in compiled.collectives),
        host=host(offloaded),
        at_peak=compiled.flops / (device.bf16_tflops * 1e12),
    )


def host(offloaded: float) -> float:
    """Seconds in which so many bytes are sent to the host and read back."""
    return 2 * offloaded / (HOST_GB_S * 1e9)


def exposed(one: Collective, slice_: hardware.Slice, clock: float) -> float:
    """Seconds of one collective that no work scheduled beside it covers."""
    return max(0.0, collective(one, slice_) - one.covered / clock)


def collective(one: Collective, slice_: hardware.Slice) -> float:
    """Seconds of one collective by itself."""
    return exchange(slice_, one.kind, one.bytes, one.parts)


def exchange(slice_: hardware.Slice, kind: str, bytes_: float, parts: int, apart: int = 1) -> float:
    """Seconds of a collective in a group of so many devices, on rings over the links that it has.

    Between slices the compiler makes sends, through the data centre's network, and receives, which come
    the other way meanwhile. Of GPUs `apart` is the distance of neighbours in the group, in the order of
    devices, which fills one node after another.
    """
    device, parts = hardware.DEVICES[slice_.device], max(parts, 2)
    if kind == "send":
        return bytes_ / (device.dcn_gb_s * 1e9)
    if kind == "recv":
        return 0.0
    link = device.link_gb_s * 1e9
    if kind == "collective-permute":
        return bytes_ / link
    share = (parts - 1) / parts * (2 if kind == "all-reduce" else 1)
    if not slice_.topology:
        return bytes_ * share / (1e9 * between_gpus(device, parts, apart))
    return bytes_ * share / (link * links(slice_.topology, parts))


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
