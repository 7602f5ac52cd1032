"""dh from the columns that matter: ``gradient="active"``, inside the exact schedules.

A trained model gives a block of tokens real probability on a few percent of the vocabulary. Once a
row's log-sum-exp is final, the columns to which any row of a block gives more than a threshold are
*active*; the rest is the tail, cut into buckets. With q the tail weights (`tail_weights`) and
u[r, b] the sum of dz[r, v] over the ids v of bucket b that are not active, over that of q[v],

    dh[r] ≈ Σ_b u[r, b]·Σ_{v in b} q[v]·W[v] + Σ_{v active} (dz[r, v] − u[r, bucket of v]·q[v])·W[v]

so every row keeps its exact sum over every bucket. dW and db are exact. Blocks count from the first
row of a tile, buckets from its first column.

How many columns are active must be read, and a GPU waits for that. So there it is read once for all
products of a block of rows in `forward`, or for all that are kept; dh of tiles that are formed
again in backward is exact. Its blocks are several of `ActiveSet.block` together, whose columns are
active where they are in any of these: more rows share a gather of head rows and make fuller
products, but have more active columns. `cost.active_hidden` says which number is fastest.

Floor per tile of N × C products, k the active share: 2·k·N·C·D flops in place of 2·N·C·D; two more
reads of the tile, in place of the read and write of its gradients where nothing else needs those;
k·N·C elements written and read; k·N·C·D / block elements of W read.
docs/active_set.md derives the error bound and has what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels.backends.contract import ActiveColumns, RowGradient
from ift_kernels.common.active_set import ActiveSet, recording
from ift_kernels.schedule import active_groups, cost
from ift_kernels.schedule.accumulate import Sum, accum_dtype
from ift_kernels.schedule.active_groups import Blocks
from ift_kernels.schedule.active_report import Report
from ift_kernels.schedule.cost import DENSE_SHARE
from ift_kernels.schedule.head import Head, Tile
from ift_kernels.schedule.problem import (
    Problem,
    active_columns,
    count_columns,
    inner_parts,
    tail_bytes,
    united_blocks,
)
from ift_kernels.schedule.tail_weights import TailWeights


class _Tail(NamedTuple):
    rows: slice
    columns: slice
    gradient: Tensor  # (buckets, rows): u above


class ActiveHidden:
    """What `gradients.Gradients` calls, tile by tile, for its gradient of hidden."""

    def __init__(self, options: ActiveSet) -> None:
        self.options = options
        self._problem: Problem | None = None
        self._tails: list[_Tail] = []
        # By their columns: q above, and the sums of head rows weighted with it, (buckets, D).
        self._tail_weights: dict[tuple[int, int], Tensor] = {}
        self._head_sums: dict[tuple[int, int], Tensor] = {}
        self._scratch: dict[str, Tensor] = {}
        self._ends: list[int] = []  # of groups of kept columns
        # Row gradient of the current rows.
        self._of: RowGradient | None = None
        self._weights: TailWeights | None = None
        self._report = None if recording() is None else Report()

    def serve(self, problem: Problem) -> None:
        """Before all else: the call that this is for."""
        self._problem, self._pending_bytes = problem, tail_bytes(problem)

    @property
    def on_gpu(self) -> bool:
        """Whether plans are a GPU's."""
        assert self._problem is not None  # by `serve`
        return self._problem.device.is_gpu

    def weigh(self, head: Head, row_gradient: RowGradient) -> None:
        """The first rows' tail weights serve all that follow."""
        if self._weights is None:
            self._weights = TailWeights(head, row_gradient, self.options.threshold)

    def mark(
        self, head: Head, tile: Tile, row_gradient: RowGradient, alone: bool
    ) -> ActiveColumns | None:
        """Which columns of a tile of products are active in which block.

        None where dh of the tile is exact: on a GPU that of a tile `alone`.
        """
        if alone and self.on_gpu:
            if self._report is not None:
                self._report.add(True, 0, tile.product.numel() / self.options.block)
            return None
        self.weigh(head, row_gradient)
        if self._of is not row_gradient:
            self._of = row_gradient
            if self._report is not None:
                of_rows = row_gradient.norm.shape[1]
                self._report.tail_mass.append(head.hidden.new_zeros(of_rows, dtype=torch.float64))
        block, threshold = self._block(tile.product), self.options.threshold
        level = math.log(threshold) if threshold else -math.inf
        # A GPU sums the tail in the same pass; on a CPU the tile is in cache until `add`.
        weights = self._weights_of(head, tile.columns) if self.on_gpu else None
        marked = head.backend.mark_active(
            head.chunk(tile), row_gradient.rows(tile.rows), level, block, self._bucket, weights
        )
        if self._report is not None:
            part = tile.product.shape[1] if alone else self._part(tile.product.shape[1])
            self._report.measure(head, tile, row_gradient.norm, marked.mask, block, part)
        return marked

    def _block(self, product: Tensor) -> int:
        return min(self.options.block, -(-len(product) // 32) * 32)

    @property
    def _bucket(self) -> int:
        assert self._problem is not None
        return count_columns(self._problem) if self.on_gpu else self.options.tail_bucket

    def add(self, head: Head, tile: Tile, marked: ActiveColumns, total: Sum) -> None:
        """Add a tile of gradients to `total`: its active columns; the tail is added by `finish`.

        All of it where a dense product costs no more.
        """
        block, counts = self._block(tile.product), marked.counts.sum(1).tolist()
        if self._report is not None:
            dense = sum(counts) >= DENSE_SHARE * marked.mask.numel()
            self._report.add(dense, sum(counts), marked.mask.numel())
        self._add(head, tile, marked, block, counts, total)

    def _add(
        self,
        head: Head,
        tile: Tile,
        marked: ActiveColumns,
        block: int,
        counts: list[int],
        total: Sum,
        row_gradient: RowGradient | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """The same, of blocks that have so many active columns each.

        The tile has products where a `row_gradient` is given; `weights`: its tail weights, if they
        are there.
        """
        if sum(counts) >= DENSE_SHARE * marked.mask.numel():
            self._add_dense(head, tile, total, row_gradient)
            return
        rows, columns, _ = tile
        weight = head.weight_chunk(columns)
        widths = [-(-count // 32) * 32 for count in counts]  # vendor products want few sizes
        active = self._take("active", head, block * sum(widths))
        if weights is None:
            weights = self._weights_of(head, columns)
        given = block, self._bucket, weights, active, counts, row_gradient
        taken = head.backend.take_active(head.chunk(tile), marked, *given)
        self._tails.append(_Tail(rows, columns, taken.tail_gradient))
        self._sum_head(head, columns, weights)
        # One kernel for all blocks, which reads head rows where they lie, where a backend has it.
        multiply: Callable[..., bool] | None = getattr(head.backend, "add_active_products", None)
        operands = active, taken.counts, block, taken.ids, weight
        assert self._problem is not None
        parts = inner_parts(self._problem, rows.stop - rows.start, block)
        if multiply is None or not multiply(*operands, total.total[rows], parts):
            self._add_blocks(head, rows, block, taken.ids.split(counts), widths, active, weight,
                             total)  # fmt: skip
        pending = [tail.gradient for tail in self._tails]
        pending += [*self._tail_weights.values(), *self._head_sums.values()]
        if 2 * sum(x.numel() * x.element_size() for x in pending) > self._pending_bytes:
            self.finish(head, total)
            self._tail_weights.clear()
            self._head_sums.clear()

    def _add_blocks(
        self,
        head: Head,
        rows: slice,
        block: int,
        ids: Sequence[Tensor],
        widths: list[int],
        active: Tensor,
        weight: Tensor,
        total: Sum,
    ) -> None:
        """A product for every block of rows, of its active columns and gathered head rows."""
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

    def _add_dense(
        self, head: Head, tile: Tile, total: Sum, row_gradient: RowGradient | None
    ) -> None:
        if row_gradient is not None:
            head.backend.dlogits_(head.chunk(tile), row_gradient)
        total.add(tile.rows, tile.product, head.weight_chunk(tile.columns))

    def add_kept(
        self,
        head: Head,
        kept: Tensor,
        tiles: Iterable[tuple[slice, ActiveColumns | None]],
        tile_columns: int,
        total: Sum,
        row_gradient: RowGradient | None = None,
    ) -> None:
        """Tiles of `kept`, gradients of all rows, given by their columns and what is active.

        Products as yet where a `row_gradient` is given.

        As many columns at once as have `active_columns` in a block: vendor products want a long
        inner size. The same for all blocks of rows, so that sums of head rows serve them all.
        """
        some, weights = [], []
        for of_tile, marked in tiles:
            assert marked is not None  # of tiles that are not alone
            some.append(marked)
            if self.on_gpu:
                weights.append(self._weights_of(head, of_tile))
        part, limit = self._part(tile_columns), self._limit(tile_columns)
        rows, columns = slice(0, len(kept)), slice(0, kept.shape[1])
        found = self._blocks(kept, some)
        if found is None:
            if self._report is not None:
                pairs = len(some[0].mask) * kept.shape[1]
                self._report.add(True, pairs, pairs, len(self._report.pending))
            self._add_dense(head, Tile(rows, columns, kept), total, row_gradient)
            return
        counts = active_groups.of_groups(found.counts, self._ends)
        if not counts or max(map(max, counts)) > limit:
            bytes_ = part * (8 + 8 * (len(kept) + head.hidden.shape[1]) // self.options.tail_bucket)
            most = max(1, self._pending_bytes // bytes_)
            self._ends = active_groups.ends_of(found.counts, limit - limit // 8, most)
            counts = active_groups.of_groups(found.counts, self._ends)
        start, together = 0, len(some[0].mask) / len(found.counts)
        of_columns = active_groups.cat(weights, 0) if weights else None
        for end, of_blocks in zip(self._ends, counts, strict=True):
            group = slice(start * part, min(end * part, kept.shape[1]))
            marked = active_groups.part_of(found.columns, group, self._bucket)
            if self._report is not None:
                active, pairs = sum(of_blocks), marked.mask.numel()
                dense = active >= DENSE_SHARE * pairs
                self._report.add(dense, active * together, pairs * together, end - start)
            tile = Tile(rows, group, kept[:, group])
            given = None if of_columns is None else of_columns[group]
            self._add(head, tile, marked, found.rows, of_blocks, total, row_gradient, given)
            start = end

    def _limit(self, tile_columns: int) -> int:
        assert self._problem is not None
        return active_columns(self._problem, tile_columns)

    def _part(self, tile_columns: int) -> int:
        """Columns of kept tiles that are not divided: all of a tile, or a bucket."""
        return self._bucket if self.on_gpu else tile_columns

    def _blocks(self, kept: Tensor, tiles: list[ActiveColumns]) -> Blocks | None:
        """The blocks that are fastest; None where a dense product is faster."""
        problem, block = self._problem, self._block(kept)
        marked = active_groups.join(tiles, self._bucket)
        assert problem is not None
        if not problem.device.is_gpu:
            of_tiles = [of_tile.counts.sum(1, keepdim=True) for of_tile in tiles]
            (counts,) = active_groups.read([active_groups.cat(of_tiles, 1)])
            return Blocks(block, marked, counts)
        sizes, choices = [block], [marked]
        for together in united_blocks(problem, block, len(marked.mask)):
            sizes.append(block * together)
            choices.append(active_groups.unite(marked, together, self._bucket))
        counts_of = active_groups.read([choice.counts for choice in choices])
        found = [Blocks(*choice) for choice in zip(sizes, choices, counts_of, strict=True)]

        def seconds(choice: Blocks) -> float:
            share = sum(map(sum, choice.counts)) / choice.columns.mask.numel()
            sizes = len(kept), kept.shape[1], choice.rows
            return cost.active_hidden(problem, *sizes, share).device

        best = min(found, key=seconds)
        dense = cost.dense_hidden(problem, len(kept), kept.shape[1]).device
        return best if seconds(best) < dense else None

    def finish(self, head: Head, total: Sum) -> None:
        """Add the tails of all tiles, and begin anew."""
        tails, self._tails = self._tails, []
        for start in sorted({tail.rows.start for tail in tails}):
            some = [tail for tail in tails if tail.rows.start == start]
            gradient = active_groups.cat([tail.gradient for tail in some], 0)
            sums = [self._head_sums[tail.columns.start, tail.columns.stop] for tail in some]
            total.total[some[0].rows].addmm_(gradient.T, active_groups.cat(sums, 0))

    def record(self) -> None:
        """Add what was formed to the innermost `record_active_sets`."""
        report = recording()
        if report is not None and self._report is not None:
            report.append(self._report.result())

    def _weights_of(self, head: Head, columns: slice) -> Tensor:
        key = columns.start, columns.stop
        if key not in self._tail_weights:
            assert self._weights is not None  # by `mark`
            self._tail_weights[key] = self._weights.of(head, columns)
        return self._tail_weights[key]

    def _sum_head(self, head: Head, columns: slice, weights: Tensor) -> None:
        """The head's rows over the buckets of these columns, for `finish`."""
        key = columns.start, columns.stop
        if key not in self._head_sums:
            sums = head.backend.bucket_sums(head.weight_rows(columns), self._bucket, weights)
            self._head_sums[key] = sums.to(accum_dtype(head.hidden.dtype))

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
