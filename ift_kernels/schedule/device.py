"""What the plan takes from a device: sizes, and the rates that products and memory reach on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Of what a vendor states, what large products and large copies reach.
GEMM_SHARE = 0.82
BANDWIDTH_SHARE = 0.9
LAUNCH_GAP = 3e-6  # seconds between two kernels


@dataclass(frozen=True)
class Device:
    """The hardware that a call is planned for; a GPU if it has multiprocessors.

    A plan is a function of this record, so it can be made for a device that is not there:
    ``explain(..., device=H200)``.
    """

    name: str
    multiprocessors: int = 0  # 0: a CPU, whose plans count products and need no rates
    bandwidth: float = 0.0  # bytes/s of device memory, as reached
    flops_16: float = 0.0  # flop/s of a large product of 16-bit matrices
    flops_32: float = 0.0  # the same of float32, without TF32
    l2_bytes: int = 0
    launch_gap: float = 0.0  # seconds
    tile_bytes: int = 16 << 20  # of a CPU: a tile of products that is in cache for its epilogue
    # A product of 16-bit matrices can be added to a float32 sum (`out_dtype` of torch.addmm).
    fp32_out: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.multiprocessors > 0

    def flops(self, dtype: torch.dtype) -> float:
        """Flop/s of a large product in `dtype`; float64 counts as half of float32."""
        if dtype.itemsize == 2:
            return self.flops_16
        return self.flops_32 if dtype.itemsize == 4 else self.flops_32 / 2


class Spec(NamedTuple):
    """What a vendor states: bytes/s, and dense flop/s of 16-bit products and of float32."""

    multiprocessors: int
    bandwidth: float
    flops_16: float
    flops_32: float
    l2_bytes: int


# By a part of the device's name; the first that fits.
SPECS = {
    "B200": Spec(148, 8.0e12, 2250e12, 80e12, 126 << 20),
    "H200": Spec(132, 4.8e12, 989e12, 67e12, 50 << 20),
    "H100 PCIe": Spec(114, 2.0e12, 756e12, 51e12, 50 << 20),
    "H100": Spec(132, 3.35e12, 989e12, 67e12, 50 << 20),
    "A100": Spec(108, 1.55e12, 312e12, 19.5e12, 40 << 20),
    "L40S": Spec(142, 0.864e12, 362e12, 91.6e12, 96 << 20),
    "RTX 4090": Spec(128, 1.008e12, 165e12, 82.6e12, 72 << 20),
    "MI300": Spec(304, 5.3e12, 1307e12, 163e12, 4 << 20),
}
# Of others, by compute capability, the newest that is not newer than theirs. Numbers of a small
# member of the family: a device taken for slower than it is gets narrower tiles at worst.
FAMILIES = {
    (0, 0): "RTX 4090",
    (8, 0): "A100",
    (8, 6): "RTX 4090",
    (9, 0): "H100 PCIe",
    (10, 0): "B200",
    (12, 0): "RTX 4090",
}
CPU = Device("CPU")


def from_properties(
    name: str,
    multiprocessors: int,
    l2_bytes: int,
    capability: tuple[int, int],
    hip: bool = False,
) -> Device:
    """The record of a GPU; a slice of one (MIG) has the share of its multiprocessors."""
    known = next((part for part in SPECS if part in name), None)
    if known is None:
        older = max(version for version in FAMILIES if version <= capability)
        known = "MI300" if hip else FAMILIES[older]
    spec = SPECS[known]
    share = multiprocessors / spec.multiprocessors
    return Device(
        name,
        multiprocessors,
        spec.bandwidth * min(share, 1.0) * BANDWIDTH_SHARE,
        spec.flops_16 * share * GEMM_SHARE,
        spec.flops_32 * share * GEMM_SHARE,
        l2_bytes,
        LAUNCH_GAP,
        fp32_out=not hip and _torch_version() >= (2, 8),
    )


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _of_spec(name: str, capability: tuple[int, int]) -> Device:
    spec = SPECS[name]
    return from_properties(name, spec.multiprocessors, spec.l2_bytes, capability)


H200 = _of_spec("H200", (9, 0))  # for plans on machines without one


def of(device: torch.device) -> Device:
    """The record of a torch device; of anything but CUDA and ROCm that of a CPU."""
    if device.type != "cuda":
        return CPU
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_index(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return from_properties(
        found.name,
        found.multi_processor_count,
        getattr(found, "L2_cache_size", 0),
        (found.major, found.minor),
        torch.version.hip is not None,
    )
