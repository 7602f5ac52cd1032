"""dh from the columns that matter: ``gradient="active"``, inside the exact schedules.

A trained model gives a block of tokens real probability on a few percent of the vocabulary. Once a
row's log-sum-exp is final, the columns to which any row of a block gives more than a threshold are
*active*; the rest is the tail, cut into buckets. With q the tail weights (`tail_weights`) and
u[r, b] the sum of dz[r, v] over the ids v of bucket b that are not active, over that of q[v],

    dh[r] ≈ Σ_b u[r, b]·Σ_{v in b} q[v]·W[v] + Σ_{v active} (dz[r, v] − u[r, bucket of v]·q[v])·W[v]

so every row keeps its exact sum over every bucket. dW and db are exact. Blocks count from the first
row of a tile, buckets from its first column.

Floor per tile of N × C products, k the active share: 2·k·N·C·D flops in place of 2·N·C·D; two more
reads of the tile, k·N·C elements written and read, k·N·C·D / block elements of W gathered.
docs/active_set.md derives the error bound and has what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels.backends.contract import RowGradient
from ift_kernels.common.active_set import ActiveSet, ActiveSetStats, recording
from ift_kernels.schedule.accumulate import Sum, accum_dtype
from ift_kernels.schedule.head import Head, Tile
from ift_kernels.schedule.tail_weights import TailWeights

# Above this share of active columns a dense product costs no more than gathering the columns.
DENSE_SHARE = 0.8


class _Tail(NamedTuple):
    rows: slice
    columns: slice
    gradient: Tensor  # (buckets, rows): u above


class _Buckets(NamedTuple):
    """The buckets of some columns."""

    weights: Tensor  # (columns,): q above
    head_sums: Tensor  # (buckets, D): of the head's rows, weighted


class _Report:
    """What `ActiveSetStats` needs, where it is recorded."""

    def __init__(self) -> None:
        self.tiles = self.dense_tiles = 0
        self.active = self.pairs = 0.0
        self.tail_mass: list[Tensor] = []  # (rows,) of each block of rows
        self.pending: list[tuple[slice, Tensor]] = []  # of tiles that may turn out dense

    def measure(self, head: Head, tile: Tile, norm: Tensor, mask: Tensor, block: int) -> None:
        """Note the probability of a tile's columns that are not active; products still raw."""
        transform = head.transform
        z = transform.apply(tile.product.double(), head.bias_chunk(tile.columns))
        p = (z - norm[:, tile.rows].double().sum(0)[:, None]).exp()
        if transform.softcap:
            p *= 1.0 - (z * (transform.temperature / transform.softcap)).square()
        active = mask.repeat_interleave(block, 0)[: len(p)] != 0
        self.pending.append((tile.rows, torch.where(active, 0.0, p).sum(1)))

    def add(self, dense: bool, active: int, pairs: int) -> None:
        self.tiles += len(self.pending)
        self.dense_tiles += len(self.pending) if dense else 0
        self.active += pairs if dense else active
        self.pairs += pairs
        for rows, mass in [] if dense else self.pending:
            self.tail_mass[-1][rows] += mass
        self.pending.clear()

    def result(self) -> ActiveSetStats:
        mass = torch.cat(self.tail_mass) if self.tail_mass else torch.zeros(1)
        share = self.active / self.pairs if self.pairs else 1.0
        return ActiveSetStats(
            share, float(mass.mean()), float(mass.max()), self.tiles, self.dense_tiles
        )


class ActiveHidden:
    """What `gradients.Gradients` calls, tile by tile, for its gradient of hidden."""

    def __init__(self, options: ActiveSet) -> None:
        self.options = options
        self.pending_bytes = 0  # of tails and buckets until `finish`, see `problem.tail_bytes`
        self._tails: list[_Tail] = []
        self._buckets: dict[tuple[int, int], _Buckets] = {}  # by their columns
        self._scratch: dict[str, Tensor] = {}
        # Row gradient of the current rows.
        self._of: RowGradient | None = None
        self._weights: TailWeights | None = None
        self._report = None if recording() is None else _Report()

    def mask(self, head: Head, tile: Tile, row_gradient: RowGradient) -> Tensor:
        """Which columns of a tile of products are active in which block, uint8 (blocks, C)."""
        target, norm, _ = row_gradient
        if self._of is not row_gradient:
            assert not self._tails  # those of the rows before are added with their own weights
            self._buckets.clear()
            self._of = row_gradient
            self._weights = TailWeights(head, row_gradient, self.options.threshold)
            if self._report is not None:
                self._report.tail_mass.append(norm.new_zeros(norm.shape[1], dtype=torch.float64))
        block, threshold = self._block(tile.product), self.options.threshold
        level = norm[:, tile.rows].sum(0) + (math.log(threshold) if threshold else -math.inf)
        mask = head.backend.active_mask(head.chunk(tile), target[tile.rows], level, block)
        if self._report is not None:
            self._report.measure(head, tile, norm, mask, block)
        return mask

    def _block(self, product: Tensor) -> int:
        return min(self.options.block, -(-len(product) // 32) * 32)

    def add(self, head: Head, tile: Tile, mask: Tensor, total: Sum) -> None:
        """Add a tile of gradients to `total`: its active columns; the tail is added by `finish`.

        All of it where a dense product costs no more.
        """
        (rows, columns, dz), weight = tile, head.weight_chunk(tile.columns)
        counts = mask.sum(1).tolist()
        dense = sum(counts) >= DENSE_SHARE * mask.numel()
        if self._report is not None:
            self._report.add(dense, sum(counts), mask.numel())
        if dense:
            total.add(rows, dz, weight)
            return
        block, bucket = self._block(dz), self.options.tail_bucket
        gradient = dz.new_empty((-(-dz.shape[1] // bucket), len(dz)), dtype=accum_dtype(dz.dtype))
        widths = [-(-count // 32) * 32 for count in counts]  # vendor products want few sizes
        active = self._take("active", head, block * sum(widths))
        weights = self._bucket_of(head, columns).weights
        head.backend.split_active(dz, mask, block, bucket, weights, gradient, active)
        self._tails.append(_Tail(rows, columns, gradient))
        ids = mask.nonzero()[:, 1].split(counts)
        start = 0
        for number, (of_block, width) in enumerate(zip(ids, widths, strict=True)):
            if not width:
                continue
            first = rows.start + number * block
            block_rows = slice(first, min(first + block, rows.stop))
            part = active[start : start + block * width].view(block, width)
            start += block * width
            gathered = self._head_rows(head, weight, of_block, width)
            total.add(block_rows, part[: block_rows.stop - first], gathered)
        pending = [tail.gradient for tail in self._tails]
        pending += [x for buckets in self._buckets.values() for x in buckets]
        if 2 * sum(x.numel() * x.element_size() for x in pending) > self.pending_bytes:
            self.finish(head, total)
            self._buckets.clear()

    def add_kept(
        self,
        head: Head,
        kept: Tensor,
        tiles: Iterable[tuple[slice, Tensor | None]],
        limit: int,
        total: Sum,
    ) -> None:
        """Tiles of `kept`, gradients of all rows, given by their columns and active masks.

        As many at once as have no more active columns in a block than `limit`, those of one tile,
        and fit: vendor products want a long inner size.
        """
        rows, masks = slice(0, len(kept)), list[Tensor]()
        start = widest = 0
        tails = 8 + 8 * (len(kept) + head.hidden.shape[1]) // self.options.tail_bucket  # bytes
        for columns, mask in tiles:
            assert mask is not None  # `add` of `Gradients` makes one
            more = int(mask.sum(1).amax())
            too_wide = (columns.stop - start) * tails > self.pending_bytes
            if masks and (widest + more > limit or too_wide):
                some = slice(start, columns.start)
                self.add(head, Tile(rows, some, kept[:, some]), torch.cat(masks, 1), total)
                masks, start, widest = [], columns.start, 0
            masks.append(mask)
            widest += more
        if masks:
            some = slice(start, kept.shape[1])
            self.add(head, Tile(rows, some, kept[:, some]), torch.cat(masks, 1), total)

    def finish(self, head: Head, total: Sum) -> None:
        """Add the tails of all tiles, and begin anew."""
        tails, self._tails = self._tails, []
        for start in sorted({tail.rows.start for tail in tails}):
            some = [tail for tail in tails if tail.rows.start == start]
            gradient = torch.cat([tail.gradient for tail in some])
            sums = torch.cat([self._bucket_of(head, tail.columns).head_sums for tail in some])
            total.total[some[0].rows].addmm_(gradient.T, sums)

    def record(self) -> None:
        """Add what was formed to the innermost `record_active_sets`."""
        report = recording()
        if report is not None and self._report is not None:
            report.append(self._report.result())

    def _bucket_of(self, head: Head, columns: slice) -> _Buckets:
        key = columns.start, columns.stop
        found = self._buckets.get(key)
        if found is None:
            assert self._weights is not None  # by `mask`
            weights = self._weights.of(head, columns)
            sums = head.backend.bucket_sums(head.weight[columns], self.options.tail_bucket, weights)
            found = _Buckets(weights, sums.to(accum_dtype(head.hidden.dtype)))
            self._buckets[key] = found
        return found

    def _take(self, name: str, head: Head, elements: int) -> Tensor:
        """Scratch in the dtype of the products, until `name` is taken again.

        The same every time: what is freed and taken again costs page faults.
        """
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < elements:
            self._scratch.pop(name, None)  # before the larger one is taken
            buffer = self._scratch[name] = head.backend.scratch(head.hidden, elements)
        return buffer[:elements]

    def _head_rows(self, head: Head, weight: Tensor, ids: Tensor, width: int) -> Tensor:
        """(width, D): rows `ids` of `weight`, the last one again for what is missing.

        Against columns of zeros, as that row is active anyway: what it holds is in the sum already.
        """
        if width > len(ids):
            ids = torch.cat([ids, ids[-1:].expand(width - len(ids))])
        out = self._take("head", head, width * weight.shape[1]).view(width, -1)
        return torch.index_select(weight, 0, ids, out=out)
