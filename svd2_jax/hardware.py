"""What a computation costs, what a device can do, and the least time the one takes on the other.

The table holds what vendors state, not what programs reach: a time worked out from it is a lower bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from svd2_jax.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, order=True)
class Cost:
    """What a computation costs; the sum of two is the cost of both.

    Attributes:
      flops: floating point operations, two for a multiply-add.
      bytes: read from and written to the device's memory.
      sent: bytes handed to other devices.
    """

    flops: int = 0
    bytes: int = 0
    sent: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.sent + other.sent)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times, self.sent * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Hardware:
    """What one device can do.

    Attributes:
      name: key in `HARDWARE`.
      memory_bytes: what CUDA reports as the device's memory. Vendors' "80 GB" are GiB of which the driver and the
        error correction take about 1 %; an own context and the libraries' workspaces come off this number.
      memory_bandwidth: bytes/s.
      flops_16bit: dense (no sparsity) bfloat16 products that are summed in float32, FLOP/s.
      flops_32bit: float32 in full precision, which means without tensor cores, FLOP/s.
      link_bandwidth: bytes/s in one direction between two devices of one host.
      source: where the numbers come from.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    flops_16bit: float
    flops_32bit: float
    link_bandwidth: float
    source: str

    def peak_flops(self, dtype_bits: int) -> float:
        """Returns FLOP/s for numbers of 16 or 32 bits; raises ConfigError for others."""
        peaks = {16: self.flops_16bit, 32: self.flops_32bit}
        if dtype_bits not in peaks:
            raise ConfigError(f"{self.name}: expected numbers of 16 or 32 bits, got {dtype_bits}")
        return peaks[dtype_bits]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return dataclasses.asdict(self)


_ENTRIES = (
    Hardware(
        "h100", int(79.1 * GIB), 3.35e12, 989.4e12, 66.9e12, 450e9,
        "NVIDIA H100 datasheet, SXM 80 GB: HBM3 3.35 TB/s, NVLink 4 900 GB/s in both directions together; H100 "
        "architecture whitepaper: 989.4 and 66.9 TFLOP/s; memory: CUDA's total, as in OpenXLA's h100_sxm target",
    ),
    Hardware(
        "h200", int(139.7 * GIB), 4.8e12, 989.4e12, 66.9e12, 450e9,
        "NVIDIA H200 datasheet, SXM 141 GB: HBM3e 4.8 TB/s, NVLink 4 900 GB/s in both directions together; compute "
        "is the H100's; memory: CUDA's total",
    ),
    Hardware(
        "a100", int(79.2 * GIB), 2.039e12, 312e12, 19.5e12, 300e9,
        "NVIDIA A100 datasheet, SXM 80 GB: HBM2e 2,039 GB/s, 312 and 19.5 TFLOP/s, NVLink 3 600 GB/s in both "
        "directions together; memory: CUDA's total, as in OpenXLA's a100_sxm_80 target",
    ),
    Hardware(
        "rtx4090", int(23.6 * GIB), 1.008e12, 165.2e12, 82.6e12, 31.5e9,
        "NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090 24 GB: GDDR6X 1008 GB/s, 165.2 TFLOP/s (bfloat16 "
        "summed in float32) and 82.6 TFLOP/s; link: PCI Express 4.0 x16, at best, as the driver copies through "
        "host memory; memory: CUDA's total",
    ),
    Hardware(
        "b200", int(178.3 * GIB), 7.67e12, 2.25e15, 74.4e12, 900e9,
        "NVIDIA DGX/HGX B200 datasheets, 180 GB: 2.25 PFLOP/s (half the sparse figure), NVLink 5 1.8 TB/s in both "
        "directions together; bandwidth as the driver's bus width and clock give it (datasheet: 8 TB/s); float32 "
        "from 148 units x 128 x 2 x 1.965 GHz; memory: CUDA's total; the last three as in OpenXLA's b200 target",
    ),
)  # fmt: skip

HARDWARE: Mapping[str, Hardware] = {entry.name: entry for entry in _ENTRIES}

# As JAX names a device. Other forms of the same chip (PCIe, NVL, laptop, 40 GB, MIG) have other numbers.
DEVICE_KINDS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA B200": "b200",
}


def hardware(name: str) -> Hardware:
    """Returns the entry called `name`; raises ConfigError with the known names otherwise."""
    if name not in HARDWARE:
        raise ConfigError(f"unknown hardware {name!r}; known are {', '.join(HARDWARE)}")
    return HARDWARE[name]


def hardware_of_device(device_kind: str) -> Hardware | None:
    """Returns the entry of a device by JAX's name for it (`Device.device_kind`), None for one not in the table."""
    name = DEVICE_KINDS.get(device_kind)
    return None if name is None else HARDWARE[name]


@dataclass(frozen=True)
class Roofline:
    """The least time a computation takes.

    Attributes:
      seconds: the largest of the times, as all may go on at once.
      bound: which one that is: arithmetic, memory traffic or what is sent to other devices.
    """

    seconds: float
    bound: Literal["compute", "memory", "link"]


def roofline(work: Cost, device: Hardware, dtype_bits: int) -> Roofline:
    """Returns the least time that `work` on numbers of 16 or 32 bits takes on a device."""
    arithmetic = work.flops / device.peak_flops(dtype_bits)
    traffic = work.bytes / device.memory_bandwidth
    link = work.sent / device.link_bandwidth if work.sent else 0.0
    bounds: tuple[Roofline, ...] = (
        Roofline(arithmetic, "compute"), Roofline(traffic, "memory"), Roofline(link, "link"),
    )  # fmt: skip
    return max(bounds, key=lambda bound: bound.seconds)
