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
import torch.nn.functional as F
from torch import Tensor

from ift_kernels.backends.contract import RowGradient
from ift_kernels.common.active_set import ActiveSet, ActiveSetStats, recording
from ift_kernels.schedule import cost
from ift_kernels.schedule.accumulate import Sum, accum_dtype
from ift_kernels.schedule.cost import DENSE_SHARE
from ift_kernels.schedule.head import Head, Tile
from ift_kernels.schedule.problem import Problem, active_columns, count_columns, tail_bytes
from ift_kernels.schedule.tail_weights import TailWeights


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


class _Blocks(NamedTuple):
    """Rows that share their active columns."""

    rows: int  # of a block
    mask: Tensor  # uint8 (blocks, C)
    totals: Tensor  # (blocks, parts): active columns up to the end of a part of the columns


def _unite(mask: Tensor, block: int, together: int, part: int) -> _Blocks:
    """Blocks of `together` blocks each, counted in parts of so many columns."""
    if together > 1:
        padded = F.pad(mask, (0, 0, 0, -len(mask) % together))
        mask = padded.view(-1, together, mask.shape[1]).amax(1)
    totals = mask.cumsum(1, dtype=torch.int32)
    ends = totals[:, part - 1 : -1 : part], totals[:, -1:]
    return _Blocks(block * together, mask, torch.cat(ends, 1))


def _ends(totals: list[list[int]], limit: int, most: int) -> list[int]:
    """Where groups of parts end that have no more than `limit` active columns in a block.

    At most so many parts each, but at least one.
    """
    ends, start, parts = list[int](), 0, len(totals[0])
    for stop in range(1, parts + 1):
        if stop < parts and stop - start < most:
            with_next = (row[stop] - (row[start - 1] if start else 0) for row in totals)
            if max(with_next) <= limit:
                continue
        ends.append(stop)
        start = stop
    return ends


def _counts(totals: list[list[int]], ends: list[int]) -> list[list[int]]:
    """Active columns of every block, group by group; empty for ends of other columns."""
    if not ends or ends[-1] != len(totals[0]):
        return []
    starts = [0, *ends[:-1]]
    return [
        [row[end - 1] - (row[start - 1] if start else 0) for row in totals]
        for start, end in zip(starts, ends, strict=True)
    ]


def ids_of_known_count(mask: Tensor, count: int) -> Tensor:
    """``mask.nonzero()[:, 1]`` of (blocks, C); a GPU would wait for that to count them."""
    found = mask.flatten() != 0
    place = found.cumsum(0).sub_(1).masked_fill_(~found, count)
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).reshape(-1)
    return place.new_empty(count + 1).scatter_(0, place, columns)[:count]


class ActiveHidden:
    """What `gradients.Gradients` calls, tile by tile, for its gradient of hidden."""

    def __init__(self, options: ActiveSet) -> None:
        self.options = options
        self._problem: Problem | None = None
        self._tails: list[_Tail] = []
        self._buckets: dict[tuple[int, int], _Buckets] = {}  # by their columns
        self._scratch: dict[str, Tensor] = {}
        self._ends: list[int] = []  # of groups of kept columns
        # Row gradient of the current rows.
        self._of: RowGradient | None = None
        self._weights: TailWeights | None = None
        self._report = None if recording() is None else _Report()

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

    def mask(self, head: Head, tile: Tile, row_gradient: RowGradient, alone: bool) -> Tensor | None:
        """Which columns of a tile of products are active in which block, uint8 (blocks, C).

        None where dh of the tile is exact: on a GPU that of a tile `alone`.
        """
        if alone and self.on_gpu:
            if self._report is not None:
                self._report.add(True, 0, tile.product.numel() / self.options.block)
            return None
        target, norm, _ = row_gradient
        self.weigh(head, row_gradient)
        if self._of is not row_gradient:
            self._of = row_gradient
            if self._report is not None:
                self._report.tail_mass.append(norm.new_zeros(norm.shape[1], dtype=torch.float64))
        block, threshold = self._block(tile.product), self.options.threshold
        level = norm[:, tile.rows].sum(0) + (math.log(threshold) if threshold else -math.inf)
        mask = head.backend.active_mask(head.chunk(tile), target[tile.rows], level, block)
        if self._report is not None:
            part = tile.product.shape[1] if alone else self._part(tile.product.shape[1])
            self._report.measure(head, tile, norm, mask, block, part)
        return mask

    def _block(self, product: Tensor) -> int:
        return min(self.options.block, -(-len(product) // 32) * 32)

    def add(self, head: Head, tile: Tile, mask: Tensor, total: Sum) -> None:
        """Add a tile of gradients to `total`: its active columns; the tail is added by `finish`.

        All of it where a dense product costs no more.
        """
        block, counts = self._block(tile.product), mask.sum(1).tolist()
        if self._report is not None:
            dense = sum(counts) >= DENSE_SHARE * mask.numel()
            self._report.add(dense, sum(counts), mask.numel())
        self._add(head, tile, mask, block, counts, total)

    def _add(
        self,
        head: Head,
        tile: Tile,
        mask: Tensor,
        block: int,
        counts: list[int],
        total: Sum,
        row_gradient: RowGradient | None = None,
    ) -> None:
        """The same, of blocks that have so many active columns each.

        The tile has products where a `row_gradient` is given.
        """
        if sum(counts) >= DENSE_SHARE * mask.numel():
            self._add_dense(head, tile, total, row_gradient)
            return
        (rows, columns, dz), weight = tile, head.weight_chunk(tile.columns)
        bucket = self.options.tail_bucket
        gradient = dz.new_empty((-(-dz.shape[1] // bucket), len(dz)), dtype=accum_dtype(dz.dtype))
        widths = [-(-count // 32) * 32 for count in counts]  # vendor products want few sizes
        active = self._take("active", head, block * sum(widths))
        weights = self._bucket_of(head, columns).weights
        split = mask, block, bucket, weights, gradient, active
        head.backend.split_active(head.chunk(tile), *split, row_gradient)
        self._tails.append(_Tail(rows, columns, gradient))
        if mask.device.type == "cpu":  # less memory
            ids = mask.nonzero()[:, 1]
        else:
            ids = ids_of_known_count(mask, sum(counts))
        # One kernel for all blocks, which reads head rows where they lie, where a backend has it.
        multiply: Callable[..., bool] | None = getattr(head.backend, "add_active_products", None)
        if multiply is None or not multiply(active, mask, block, ids, weight, total.total[rows]):
            self._add_blocks(head, rows, block, ids.split(counts), widths, active, weight, total)
        pending = [tail.gradient for tail in self._tails]
        pending += [x for buckets in self._buckets.values() for x in buckets]
        if 2 * sum(x.numel() * x.element_size() for x in pending) > self._pending_bytes:
            self.finish(head, total)
            self._buckets.clear()

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
        tiles: Iterable[tuple[slice, Tensor | None]],
        tile_columns: int,
        total: Sum,
        row_gradient: RowGradient | None = None,
    ) -> None:
        """Tiles of `kept`, gradients of all rows, given by their columns and active masks.

        Products as yet where a `row_gradient` is given.

        As many columns at once as have `active_columns` in a block: vendor products want a long
        inner size. The same for all blocks of rows, so that sums of head rows serve them all.
        """
        masks = []
        for _, mask in tiles:
            assert mask is not None  # of tiles that are not alone
            masks.append(mask)
        part, limit = self._part(tile_columns), self._limit(tile_columns)
        rows, columns = slice(0, len(kept)), slice(0, kept.shape[1])
        found = self._blocks(kept, torch.cat(masks, 1), part)
        if found is None:
            if self._report is not None:
                pairs = len(masks[0]) * kept.shape[1]
                self._report.add(True, pairs, pairs, len(self._report.pending))
            self._add_dense(head, Tile(rows, columns, kept), total, row_gradient)
            return
        blocks, totals = found
        counts = _counts(totals, self._ends)
        if not counts or max(map(max, counts)) > limit:
            bytes_ = part * (8 + 8 * (len(kept) + head.hidden.shape[1]) // self.options.tail_bucket)
            most = max(1, self._pending_bytes // bytes_)
            self._ends = _ends(totals, limit - limit // 8, most)
            counts = _counts(totals, self._ends)
        start, together = 0, len(masks[0]) / len(blocks.mask)
        for end, of_blocks in zip(self._ends, counts, strict=True):
            some = slice(start * part, min(end * part, kept.shape[1]))
            mask = blocks.mask[:, some].contiguous()
            if self._report is not None:
                active, pairs = sum(of_blocks), mask.numel()
                dense = active >= DENSE_SHARE * pairs
                self._report.add(dense, active * together, pairs * together, end - start)
            tile = Tile(rows, some, kept[:, some])
            self._add(head, tile, mask, blocks.rows, of_blocks, total, row_gradient)
            start = end

    def _limit(self, tile_columns: int) -> int:
        assert self._problem is not None
        return active_columns(self._problem, tile_columns)

    def _part(self, tile_columns: int) -> int:
        """Columns of kept tiles that are not divided: all of a tile, or a bucket."""
        assert self._problem is not None
        if not self._problem.device.is_gpu:
            return tile_columns
        return count_columns(self._problem)

    def _blocks(
        self, kept: Tensor, mask: Tensor, tile_columns: int
    ) -> tuple[_Blocks, list[list[int]]] | None:
        """The blocks that are fastest, and their totals: all that a GPU waits for.

        None where a dense product is faster.
        """
        problem, block, count, together = self._problem, self._block(kept), len(mask), [1]
        assert problem is not None
        if problem.device.is_gpu:
            even = {-(-count >> bits) for bits in range(count.bit_length())} - {1}
            # At most an eighth of the rows of all blocks is not there.
            together += sorted(size for size in even if -count % size * 8 <= count)
        choices = [_unite(mask, block, size, tile_columns) for size in together]
        flat = torch.cat([choice.totals.flatten() for choice in choices]).tolist()
        found, start = [], 0
        for choice in choices:
            size, tiles = choice.totals.shape
            end = start + size * tiles
            found.append((choice, [flat[at : at + tiles] for at in range(start, end, tiles)]))
            start = end
        if not problem.device.is_gpu:
            return found[0]

        def seconds(choice: tuple[_Blocks, list[list[int]]]) -> float:
            blocks, totals = choice
            share = sum(row[-1] for row in totals) / blocks.mask.numel()
            sizes = len(kept), mask.shape[1], blocks.rows
            return cost.active_hidden(problem, *sizes, share).device

        best = min(found, key=seconds)
        dense = cost.dense_hidden(problem, len(kept), mask.shape[1]).device
        return best if seconds(best) < dense else None

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
