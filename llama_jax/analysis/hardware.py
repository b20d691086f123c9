"""What a device can do: peak rate, memory, power. Looked up by the name that JAX gives the device."""

from typing import NamedTuple


class Device(NamedTuple):
    """One JAX device (on TPU v2 and v3 a core, half a chip). 0: not published."""

    bf16_tflops: float
    watts: float  # drawn by the whole chip for each device of it


# TPU rates and memory: cloud.google.com/tpu/docs/system-architecture-tpu-vm. Watts of v3 and v4 are the
# means measured in production, arXiv:2304.01433 table 4; of A100 the figure of arXiv:2302.13971 table 15;
# of H100 and H200 the SXM data sheet.
DEVICES = {
    "TPU v2": Device(22.5, 0),
    "TPU v3": Device(61.5, 110),
    "TPU v4": Device(275, 170),
    "TPU v5 lite": Device(197, 0),
    "TPU v5": Device(459, 0),
    "TPU v6 lite": Device(918, 0),
    "NVIDIA A100": Device(312, 400),
    "NVIDIA H100": Device(989.4, 700),
    "NVIDIA H200": Device(989.4, 700),
}


def find(device_kind: str) -> Device:
    """The device whose name is the longest beginning of `device_kind`; zeros when none is."""
    names = [name for name in DEVICES if device_kind.startswith(name)]
    return DEVICES[max(names, key=len)] if names else Device(0, 0)
