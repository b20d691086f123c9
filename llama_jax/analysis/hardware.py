"""What devices and slices can do: rates, memory, power, links. Facts with their sources; no choices."""

from typing import NamedTuple

from llama_jax import config


class Device(NamedTuple):
    """One JAX device (on TPU v2 and v3 a core, half a chip). 0: not published."""

    bf16_tflops: float
    watts: float = 0  # drawn by the whole chip for each device of it
    hbm_gib: float = 0  # what a program may use
    ghz: float = 0  # of the clock in which the compiler counts cycles
    link_gb_s: float = 0  # one link between chips (GPUs: all of a GPU's links), one way
    links: int = 0  # of a chip
    hbm_gb_s: float = 0  # read or written
    dcn_gb_s: float = 0  # a device's share of the data centre's network, one way


# TPU rates and memory: cloud.google.com/tpu/docs/system-architecture-tpu-vm; memory is what the compiler
# lets a program have. Watts of v3 and v4 are the means measured in production, arXiv:2304.01433 table 4;
# of A100 the figure of arXiv:2302.13971 table 15; of H100 and H200 the SXM data sheet. Clocks: v2 and v3
# doi:10.1145/3360307, v4 arXiv:2304.01433 table 4; of the later ones peak rate over operations a cycle.
# Bandwidth of HBM: the same pages and data sheets; of v2 and v3 half a chip's.
# Links: v2 and v3 doi:10.1145/3360307 (496 and 656 Gbit/s), v4 arXiv:2304.01433 (50 GB/s), less what
# measurements reach (jax-ml.github.io/scaling-book: 45, 90). The data centre's network: 6.4 Tbit/s for the
# 256 chips of a v5e pod and 25.6 for those of v6e, 50 Gbit/s a chip of v5p (the same pages).
DEVICES = {
    "TPU v2": Device(22.5, 0, 7.5, 0.7, 62, 4, 350),
    "TPU v3": Device(61.5, 110, 15.5, 0.94, 82, 4, 450),
    "TPU v4": Device(275, 170, 30.75, 1.05, 45, 6, 1228),
    "TPU v5 lite": Device(197, 0, 15.75, 1.503, 45, 4, 819, 3.125),
    "TPU v5": Device(459, 0, 95.0, 1.75, 90, 6, 2765, 6.25),
    "TPU v6 lite": Device(918, 0, 31.25, 1.75, 90, 4, 1640, 12.5),
    "NVIDIA A100": Device(312, 400, 74.0, 0, 300, 1, 2039),
    "NVIDIA H100": Device(989.4, 700, 74.0, 0, 450, 1, 3350),
    "NVIDIA H200": Device(989.4, 700, 130.0, 0, 450, 1, 4800),
}


# KiB of its vector memory that one operation may use: larger tiles read HBM less often. A third faster on
# v6e than with the compiler's own limit, an eighth on v5e and v5p; v4 takes no other (LOG.md).
TILE_KIB = {"TPU v5 lite": 98304, "TPU v5": 65472, "TPU v6 lite": 98304}
SPARSE_CORES = ("TPU v5", "TPU v6 lite")  # they gather and reduce beside the products


def find(device_kind: str) -> Device:
    """The device whose name is the longest beginning of `device_kind`; zeros when none is."""
    return DEVICES.get(_name(device_kind), Device(0))


def compiler_options(device_kind: str) -> dict[str, str]:
    """What XLA is told beyond its defaults; what each buys is in LOG.md."""
    if not device_kind.startswith("TPU"):
        return {}
    # Else float32 parameters that are only ever used as bfloat16 are cast ahead of the layers and kept.
    options, name = {"xla_jf_bf16_propagation": "false"}, _name(device_kind)
    if name in TILE_KIB:
        options["xla_tpu_scoped_vmem_limit_kib"] = str(TILE_KIB[name])
    if name in SPARSE_CORES:
        offload = "xla_tpu_enable_sparse_core_collective_offload_"
        kinds = ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter")
        options |= {offload + kind: "true" for kind in kinds}
    if name == "TPU v4":
        options["xla_enable_async_all_gather"] = "true"  # the default on v5e
    return options


def _name(device_kind: str) -> str:
    return max((name for name in DEVICES if device_kind.startswith(name)), key=len, default="")


class Slice(NamedTuple):
    """What is rented as one: a TPU slice, several joined by the data centre's network, a GPU node."""

    device: str  # a key of DEVICES
    devices: int  # in all
    hosts: int
    accelerator: str  # as the cloud calls it
    topology: str = ""  # as JAX's compiler calls one slice; "" where it has none
    slices: int = 1

    @property
    def kernel(self) -> str:
        """The attention kernel that its devices run. Splash needs a TPU v4 or later."""
        if self.device.startswith("NVIDIA"):
            return "cudnn"
        return "blockwise" if self.device in ("TPU v2", "TPU v3") else "splash"


# The number in the name of v2, v3, v4 and v5p counts cores, two a chip; of v5e and v6e chips.
_CUBES = {
    **{8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
    **{512: "4x8x8", 1024: "8x8x8"},
}
_SQUARES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def _slices():
    yield "v2_8", Slice("TPU v2", 8, 1, "v2-8", "v2:2x2")
    yield "v3_8", Slice("TPU v3", 8, 1, "v3-8", "v3:2x2")
    yield "v3_32", Slice("TPU v3", 32, 4, "v3-32", "v3:4x4")
    for cores, shape in _CUBES.items():
        chips = cores // 2
        if cores <= 512:
            yield f"v4_{cores}", Slice("TPU v4", chips, chips // 4, f"v4-{cores}", f"v4:{shape}")
        yield f"v5p_{cores}", Slice("TPU v5", chips, chips // 4, f"v5p-{cores}", f"v5p:{shape}")
    for chips, shape in _SQUARES.items():
        hosts = max(chips // 4, 1) if chips > 8 else 1
        for name, device, cloud in (
            ("v5e", "TPU v5 lite", "v5litepod"),
            ("v6e", "TPU v6 lite", "v6e"),
        ):
            where = f"{name}:{shape}"
            yield f"{name}_{chips}", Slice(device, chips, hosts, f"{cloud}-{chips}", where)
    yield "v5e_256x2", Slice("TPU v5 lite", 512, 128, "v5litepod-256", "v5e:16x16", 2)
    yield "a100_8", Slice("NVIDIA A100", 8, 1, "8xA100")
    yield "h100_8", Slice("NVIDIA H100", 8, 1, "8xH100")


SLICES = dict(_slices())


def find_slice(name: str, place: str) -> Slice:
    """ValueError with the nearest name if there is none such; v4-32 is v4_32."""
    return config.choose(SLICES, name.replace("-", "_"), place)
