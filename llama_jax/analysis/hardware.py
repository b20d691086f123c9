"""What devices and slices can do: rates, memory, power, links. Facts with their sources; no choices."""

from typing import NamedTuple

from llama_jax import config


class Device(NamedTuple):
    """One JAX device (on TPU v2, v3 and v7x a core, half a chip). 0: not published."""

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
# measurements reach (jax-ml.github.io/scaling-book: 45, 90). Of v7x half a chip's: 2,307 TFLOP/s, 7.37 TB/s
# (docs.cloud.google.com/tpu/docs/tpu7x). The data centre's network: 6.4 Tbit/s for the
# 256 chips of a v5e pod and 25.6 for those of v6e, 50 Gbit/s a chip of v5p (the same pages); of GPUs one
# InfiniBand port each, 200 Gbit/s beside an A100 and 400 beside an H100 (data sheets of DGX A100 and H100).

# JAX gives a process 75% of a GPU's memory unless XLA_CLIENT_MEM_FRACTION says otherwise; experiments/cli.py
# sets this share. CUDA reports 79.1 GiB of an A100 or H100 sold with 80 GB and 139.7 of an H200, so that 5.5
# and 9.8 GiB are left to CUDA's context, NCCL's buffers and the workspaces of cuDNN and cuBLAS.
GPU_MEMORY_FRACTION = 0.93


def _of_gpu(gib: float) -> float:
    return round(GPU_MEMORY_FRACTION * gib, 1)


DEVICES = {
    "TPU v2": Device(22.5, 0, 7.5, 0.7, 62, 4, 350),
    "TPU v3": Device(61.5, 110, 15.5, 0.94, 82, 4, 450),
    "TPU v4": Device(275, 170, 30.75, 1.05, 45, 6, 1228),
    "TPU v5 lite": Device(197, 0, 15.75, 1.503, 45, 4, 819, 3.125),
    "TPU v5": Device(459, 0, 95.0, 1.75, 90, 6, 2765, 6.25),
    "TPU v6 lite": Device(918, 0, 31.25, 1.75, 90, 4, 1640, 12.5),
    "TPU7x": Device(1153.5, 0, 94.75, 2.2, 45, 6, 3690),
    "NVIDIA A100": Device(312, 400, _of_gpu(79.1), 0, 300, 1, 2039, 25),
    "NVIDIA H100": Device(989.4, 700, _of_gpu(79.1), 0, 450, 1, 3350, 50),
    "NVIDIA H200": Device(989.4, 700, _of_gpu(139.7), 0, 450, 1, 4800, 50),
}


# KiB of its vector memory that one operation may use: larger tiles read HBM less often. A third faster on
# v6e than with the compiler's own limit, an eighth on v5e and v5p; v4 takes no other. On v5e a third of what
# v6e takes gives as few cycles and compiles in half of the time (LOG.md). Above what v7x has, the compiler
# retries with ever smaller tiles: 65,472 compiles a product 11 times as long as 49,152 and makes it slower.
TILE_KIB = {"TPU v5 lite": 32768, "TPU v5": 65472, "TPU v6 lite": 98304, "TPU7x": 57344}
HALF_CHIPS = ("TPU v2", "TPU v3", "TPU7x")  # a device is one of a chip's two cores
SPARSE_CORES = ("TPU v5", "TPU v6 lite", "TPU7x")  # they gather and reduce beside the products


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
    if name == "TPU v6 lite":
        # Else, over few chips, products become rings of permutes with copies between: a third more cycles
        # for Llama 3.1 8B on v6e-8.
        options["xla_jf_spmd_threshold_for_windowed_einsum_mib"] = "1000000"
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
    def chips(self) -> int:
        return self.devices // (2 if self.device in HALF_CHIPS else 1)

    @property
    def kernel(self) -> str:
        """The attention kernel that its devices run. Splash needs a TPU v4 or later."""
        if self.device.startswith("NVIDIA"):
            return "cudnn"
        return "blockwise" if self.device in ("TPU v2", "TPU v3") else "splash"


# The number in the name of v2, v3, v4, v5p and v7x counts cores, two a chip; of v5e and v6e chips.
_CUBES = {
    **{8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
    **{512: "4x8x8", 1024: "8x8x8"},
}
_SQUARES = {
    **{1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    **{32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
}
# Generations whose slices the cloud calls by another name than this project.
_CLOUD = {"v5litepod": "v5e", "tpu7x": "v7x"}


def _slices():
    yield "v2_8", Slice("TPU v2", 8, 1, "v2-8", "v2:2x2")
    yield "v3_8", Slice("TPU v3", 8, 1, "v3-8", "v3:2x2")
    yield "v3_32", Slice("TPU v3", 32, 4, "v3-32", "v3:4x4")
    for cores, shape in _CUBES.items():
        chips = cores // 2
        if cores <= 512:
            yield f"v4_{cores}", Slice("TPU v4", chips, chips // 4, f"v4-{cores}", f"v4:{shape}")
        yield f"v5p_{cores}", Slice("TPU v5", chips, chips // 4, f"v5p-{cores}", f"v5p:{shape}")
        # A v7x chip is two devices, each with its half of the memory.
        yield f"v7x_{cores}", Slice("TPU7x", cores, chips // 4, f"tpu7x-{cores}", f"tpu7x:{shape}")
    for chips, shape in _SQUARES.items():
        hosts = chips // 4 if chips > 8 else 1
        for name, device, cloud in (
            ("v5e", "TPU v5 lite", "v5litepod"),
            ("v6e", "TPU v6 lite", "v6e"),
        ):
            where = f"{name}:{shape}"
            yield f"{name}_{chips}", Slice(device, chips, hosts, f"{cloud}-{chips}", where)
    yield "v5e_256x2", Slice("TPU v5 lite", 512, 128, "v5litepod-256", "v5e:16x16", 2)
    yield "v6e_256x2", Slice("TPU v6 lite", 512, 128, "v6e-256", "v6e:16x16", 2)


# GPUs come in nodes of 8 (NVLink within, a network between them): a100_16 is two nodes.
GPUS_PER_NODE, MOST_GPUS = 8, 2048
GPUS = {"a100": "NVIDIA A100", "h100": "NVIDIA H100"}


def _nodes(kind: str, gpus: int) -> Slice:
    nodes = gpus // GPUS_PER_NODE
    node = f"{GPUS_PER_NODE}x{kind.upper()}"
    return Slice(GPUS[kind], gpus, nodes, node if nodes == 1 else f"{nodes} nodes of {node}")


SLICES = dict(_slices()) | {
    f"{kind}_{2**n}": _nodes(kind, 2**n)
    for kind in GPUS
    for n in range(MOST_GPUS.bit_length())
    if 2**n >= GPUS_PER_NODE
}


def name_of(name: str) -> str:
    """The name in SLICES of a slice that may be called as the cloud does: v4-32, v5litepod-16, tpu7x-8."""
    kind, _, number = name.replace("-", "_").partition("_")
    return f"{_CLOUD.get(kind, kind)}_{number}"


def find_slice(name: str, place: str = "mesh.hardware") -> Slice:
    """The slice of that name: one of SLICES, or so many GPUs; the cloud's own names are known, too.

    ValueError with the nearest name if there is none such.
    """
    name = name_of(name)
    kind, _, number = name.partition("_")
    if kind in GPUS and number.isdecimal():
        gpus = int(number)
        if gpus % GPUS_PER_NODE or not GPUS_PER_NODE <= gpus <= MOST_GPUS:
            near = min(max(round(gpus / GPUS_PER_NODE), 1) * GPUS_PER_NODE, MOST_GPUS)
            raise ValueError(
                f"{place}={name!r} must be whole nodes of {GPUS_PER_NODE} GPUs, at most {MOST_GPUS:,}; "
                f"nearest: '{kind}_{near}'"
            )
        return _nodes(kind, gpus)
    return config.choose(SLICES, name, place)


def names() -> str:
    """What `find_slice` finds, for messages."""
    tpus = [name for name in SLICES if name.partition("_")[0] not in GPUS]
    gpus = " or ".join(f"{kind}_N" for kind in GPUS)
    return f"{', '.join(tpus)}, and {gpus} for N GPUs, a multiple of {GPUS_PER_NODE} up to {MOST_GPUS:,}"
