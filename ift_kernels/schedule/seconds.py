"""Seconds of a GPU by what takes them, and those of a vendor's product: parts of `cost`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ift_kernels.schedule.device import Device

# Tiles of vendor products and the share of the peak rate that their inner loop reaches.
GEMM_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.85))
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)  # of the inner size, where tiles leave multiprocessors idle
MIN_SPLIT = 512  # elements of the inner size
WAVE = 2e-6  # seconds until a wave of tiles is full, and to write its result
HOST = 10e-6  # seconds of the host for a launch


@dataclass(frozen=True)
class Cost:
    """Seconds of forward and backward together, by what takes them."""

    products: float = 0.0
    epilogues: float = 0.0
    accumulation: float = 0.0  # sums over tiles, casts, copies into results
    gaps: float = 0.0  # between launches
    launches: int = 0
    bytes: float = 0.0  # that epilogues and accumulation move
    peak_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.products + other.products,
            self.epilogues + other.epilogues,
            self.accumulation + other.accumulation,
            self.gaps + other.gaps,
            self.launches + other.launches,
            self.bytes + other.bytes,
            max(self.peak_bytes, other.peak_bytes),
        )

    def __mul__(self, count: int) -> Cost:
        return Cost(
            self.products * count,
            self.epilogues * count,
            self.accumulation * count,
            self.gaps * count,
            self.launches * count,
            self.bytes * count,
            self.peak_bytes,
        )

    @property
    def device(self) -> float:
        """Seconds of the device."""
        return self.products + self.epilogues + self.accumulation + self.gaps

    @property
    def host(self) -> float:
        """Seconds of the host, which launches while the device works."""
        return self.launches * HOST

    @property
    def seconds(self) -> float:
        return max(self.device, self.host)


@functools.lru_cache(maxsize=4096)
def gemm(device: Device, dtype: torch.dtype, m: int, n: int, k: int, result: int = 0) -> float:
    """Seconds of a vendor's product (m, k) @ (k, n): whole waves of tiles, split-K if they are few.

    At least as long as its operands and its result, of `result` bytes an element if that is not
    theirs, take to pass through memory.
    """
    if not m * n * k:
        return 0.0
    rate = device.flops(dtype) / device.multiprocessors
    best = math.inf
    for rows, columns, share in GEMM_TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        for split in SPLITS:
            if split > 1 and (k < split * MIN_SPLIT or tiles >= device.multiprocessors * 2):
                break
            waves = math.ceil(tiles * split / device.multiprocessors)
            time = waves * (2 * rows * columns * math.ceil(k / split) / (rate * share) + WAVE)
            if split > 1:  # float32 parts are written and read once more
                time += device.launch_gap + m * n * 8 * split / device.bandwidth
            best = min(best, time)
    moved = (m * k + k * n) * dtype.itemsize + m * n * (result or dtype.itemsize)
    return max(best, moved / device.bandwidth)
