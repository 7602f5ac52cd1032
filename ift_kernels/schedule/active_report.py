"""What `record_active_sets` reports of the active set of one gradient of hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.common.active_set import ActiveSetStats
from ift_kernels.schedule.head import Head, Tile


class Report:
    """What `ActiveSetStats` needs, where it is recorded."""

    def __init__(self) -> None:
        self.tiles = self.dense_tiles = 0
        self.active = self.pairs = 0.0
        self.tail_mass: list[Tensor] = []  # (rows,) of each block of rows
        self.pending: list[tuple[slice, Tensor]] = []  # of parts that may turn out dense

    def measure(
        self, head: Head, tile: Tile, norm: Tensor, mask: Tensor, block: int, part: int
    ) -> None:
        """Note the probability of columns that are not active, by parts; products still raw."""
        transform = head.transform
        z = transform.apply(tile.product.double(), head.bias_chunk(tile.columns))
        p = (z - norm[:, tile.rows].double().sum(0)[:, None]).exp()
        if transform.softcap:
            p *= 1.0 - (z * (transform.temperature / transform.softcap)).square()
        active = mask.repeat_interleave(block, 0)[: len(p)] != 0
        tail = torch.where(active, 0.0, p).split(part, 1)
        self.pending += [(tile.rows, of_part.sum(1)) for of_part in tail]

    def add(self, dense: bool, active: float, pairs: float, parts: int = 1) -> None:
        """Of the first pending parts: active (block, column) pairs, and all."""
        some, self.pending = self.pending[:parts], self.pending[parts:]
        self.tiles += parts
        self.dense_tiles += parts if dense else 0
        self.active += pairs if dense else active
        self.pairs += pairs
        for rows, mass in [] if dense else some:
            self.tail_mass[-1][rows] += mass

    def result(self) -> ActiveSetStats:
        mass = torch.cat(self.tail_mass) if self.tail_mass else torch.zeros(1)
        share = self.active / self.pairs if self.pairs else 1.0
        return ActiveSetStats(
            share, float(mass.mean()), float(mass.max()), self.tiles, self.dense_tiles
        )
