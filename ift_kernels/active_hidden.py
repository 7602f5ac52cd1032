"""dh from the columns that matter, where the head is trained by its exact gradient.

``gradient="active"`` with ``dW="dense"``. The schedule is the exact one of `engine`: dW and db need
the gradient dz of every product, so a tile of them is there whole. dh does not; with q the profile
of the tail and u[r, t] the sum of dz[r, v], over that of q[v], over those ids v of tail tile t that
are not active in r's block,

    dh[r] ≈ Σ_t u[r, t]·Σ_{v in t} q[v]·W[v] + Σ_{v active} (dz[r, v] − u[r, tile of v]·q[v])·W[v]

`ift_kernels.active` has the reasons and the words. Blocks count from the first row of a tile, tail
tiles from its first column.

Floor per tile of N × C products, k the active share: (4 + 2k)·N·C·D flops against 6 dense; bytes
beyond the exact schedule: two more reads of the tile, k·N·C elements written and read, and
k·N·C·D / block elements of W gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels.active import DENSE_SHARE, Rooms, marks_of
from ift_kernels.active_set import ActiveSet
from ift_kernels.engine import Head, RowGradient, Tile
from ift_kernels.sums import Sum, wide_dtype
from ift_kernels.tail_profile import TailProfile


class _Tail(NamedTuple):
    rows: slice
    columns: slice
    mean: Tensor  # (tail tiles, rows)


class _Spread(NamedTuple):
    """How the tails of some columns are spread, and what comes of it."""

    profile: Tensor  # (columns,)
    sums: Tensor  # (tail tiles, D): of the head's rows times the profile


class ActiveHidden:
    """What `engine.Gradients` asks, tile by tile, for its gradient of hidden."""

    def __init__(self, options: ActiveSet) -> None:
        self.options = options
        self.room = 0  # bytes, see `plan.tail_room`
        self._tails: list[_Tail] = []
        self._spreads: dict[tuple[int, int], _Spread] = {}  # by their columns
        self._rooms = Rooms()
        # The rows at work, told apart by their row gradient.
        self._of: RowGradient | None = None
        self._profile: TailProfile | None = None

    def mark(self, head: Head, tile: Tile, row_gradient: RowGradient) -> Tensor:
        """The marks of a tile of products."""
        target, norm, _ = row_gradient
        if self._of is not row_gradient:
            assert not self._tails  # those of the rows before are added with their own profile
            self._spreads.clear()
            self._of = row_gradient
            self._profile = TailProfile(head, row_gradient, self.options.threshold)
        log_sum_exp, block = norm[:, tile.rows].sum(0), self._block(tile.product)
        return marks_of(head, tile, target, log_sum_exp, self.options.threshold, block)

    def _block(self, product: Tensor) -> int:
        return min(self.options.block, -(-len(product) // 32) * 32)

    def add(self, head: Head, tile: Tile, marks: Tensor, total: Sum) -> None:
        """Add a tile of gradients to `total`: its active columns, the tail waits for `finish`.

        All of it where a dense product costs no more.
        """
        (rows, columns, dz), weight = tile, head.weight_chunk(tile.columns)
        counts = marks.sum(1).tolist()
        if sum(counts) >= DENSE_SHARE * marks.numel():
            total.add(rows, dz, weight)
            return
        block, tail = self._block(dz), self.options.tail_tile
        mean = dz.new_empty((-(-dz.shape[1] // tail), len(dz)), dtype=wide_dtype(dz.dtype))
        widths = [-(-count // 32) * 32 for count in counts]  # vendor products want few sizes
        active = self._rooms.take("active", head, block * sum(widths))
        profile = self._spread(head, columns).profile
        head.backend.active_rows(dz, marks, block, tail, profile, mean, active)
        self._tails.append(_Tail(rows, columns, mean))
        ids = marks.nonzero()[:, 1].split(counts)
        start = 0
        for number, (some, width) in enumerate(zip(ids, widths, strict=True)):
            if not width:
                continue
            first = rows.start + number * block
            here = slice(first, min(first + block, rows.stop))
            part = active[start : start + block * width].view(block, width)
            start += block * width
            gathered = self._rooms.head_rows(head, weight, some, width)
            total.add(here, part[: here.stop - here.start], gathered)
        waiting = [tail.mean for tail in self._tails]
        waiting += [x for spread in self._spreads.values() for x in spread]
        if 2 * sum(x.numel() * x.element_size() for x in waiting) > self.room:
            self.finish(head, total)
            self._spreads.clear()

    def add_kept(
        self,
        head: Head,
        kept: Tensor,
        tiles: Iterable[tuple[slice, Tensor | None]],
        limit: int,
        total: Sum,
    ) -> None:
        """Tiles of `kept`, gradients of all rows, given by their columns and marks.

        As many at once as have no more active columns in a block than `limit`, those of one tile:
        vendor products want a long inner size.
        """
        rows, waiting = slice(0, len(kept)), list[Tensor]()
        start = most = 0
        for columns, marks in tiles:
            assert marks is not None  # made as this set asks for
            more = int(marks.sum(1).amax())
            if waiting and most + more > limit:
                some = slice(start, columns.start)
                self.add(head, Tile(rows, some, kept[:, some]), torch.cat(waiting, 1), total)
                waiting, start, most = [], columns.start, 0
            waiting.append(marks)
            most += more
        if waiting:
            some = slice(start, kept.shape[1])
            self.add(head, Tile(rows, some, kept[:, some]), torch.cat(waiting, 1), total)

    def finish(self, head: Head, total: Sum) -> None:
        """Add the tails of all tiles, and begin anew."""
        tails, self._tails = self._tails, []
        for start in sorted({tail.rows.start for tail in tails}):
            some = [tail for tail in tails if tail.rows.start == start]
            mean = torch.cat([tail.mean for tail in some])
            sums = torch.cat([self._spread(head, tail.columns).sums for tail in some])
            total.total[some[0].rows].addmm_(mean.T, sums)

    def _spread(self, head: Head, columns: slice) -> _Spread:
        key = columns.start, columns.stop
        found = self._spreads.get(key)
        if found is None:
            assert self._profile is not None  # by `mark`
            profile = self._profile.of(head, columns)
            sums = head.backend.tile_sums(head.weight[columns], self.options.tail_tile, profile)
            found = _Spread(profile, sums.to(wide_dtype(head.hidden.dtype)))
            self._spreads[key] = found
        return found
