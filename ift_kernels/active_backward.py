"""Gradients from an active set: what is kept of a tile decides how its share is formed.

Read `ift_kernels.active` first. Tile by tile, each with the vocabulary ids of its columns: products
that are there whole give dense gradients, active columns give sparse ones, and what was not kept is
computed again and then treated as either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ift_kernels import active
from ift_kernels.active import (
    AGAIN,
    DENSE_SHARE,
    MASS,
    MASS_Z,
    REFERENCE,
    SLOPES,
    SPARSE,
    Formed,
    Tiling,
)
from ift_kernels.engine import Head, Results, RowGradient, Tile, Transposed, slices
from ift_kernels.sums import Sum, wide_dtype
from ift_kernels.tail_profile import TailProfile


def gradients(
    head: Head,
    row_gradient: RowGradient,
    needs: tuple[bool, bool, bool],
    hidden_dtype: torch.dtype,
    at: Tiling,
    formed: Formed,
) -> Results:
    """Gradients of hidden (in `hidden_dtype`), weight and bias; the products kept are consumed."""
    n = head.hidden.shape[0]
    (rows, columns, block), *layout = formed.layout.tolist()
    at = replace(at, rows=rows, columns=columns, block=block)
    total = _Totals(head, row_gradient, needs, at)
    order = active.tiles(head, at)
    again = [where for where, tile in zip(order, layout, strict=True) if tile[0] == AGAIN]
    recomputed = active.products(head, at, again) if again else iter(())
    if len(formed.marks):
        total.add_tails(slice(0, n), slice(0, head.vocabulary), formed.marks, formed.tails)
    # Together where their active columns are copied anyway, see `_Totals.flip`; and not where the
    # head's rows are cast, which is done tile by tile.
    together = total.flip and head.weight.dtype == head.hidden.dtype
    limit = at.columns if together else -1
    for some, counts in _together(order, layout, formed.marks, at, limit):
        (rows, columns), (kind, start, _) = order[some.start], layout[some.start]
        columns = slice(columns.start, order[some.stop - 1][1].stop)
        if kind == SPARSE:
            marks, count = formed.marks[at.blocks(rows), columns], sum(map(sum, counts))
            store = formed.store[start : start + count * at.block].view(count, at.block)
            total.add_sparse(rows, [where[1] for where in order[some]], counts, marks, store)
        elif kind == AGAIN:
            total.add_whole(next(recomputed), mark=True)
        else:
            size = rows.stop - rows.start, columns.stop - columns.start
            end = start + active.whole_elements(formed.store, *size)
            product = formed.store[start:end].view(size[0], -1)[:, : size[1]]
            total.add_whole(Tile(rows, columns, product), mark=False)
        if rows.stop == n:
            total.finish(columns)
    return total.results(hidden_dtype)


def _together(
    order: list[tuple[slice, slice]], layout: list[list[int]], marks: Tensor, at: Tiling, limit: int
) -> Iterator[tuple[slice, list[list[int]]]]:
    """The tiles in runs: of active columns, the same rows, and side by side in the store.

    With at most `limit` active columns in a block, those of one tile: vendor products want a long
    inner size, and every product is added to the sum of dh. Other tiles are alone. With each run
    the numbers of active columns, by tile and block.
    """
    counts: list[list[int]] = []
    first = most = end = 0
    for number, ((rows, columns), (kind, start, _)) in enumerate(zip(order, layout, strict=True)):
        here = marks[at.blocks(rows), columns].sum(1).tolist() if kind == SPARSE else []
        more = max(here, default=limit + 1)  # a tile that is not SPARSE is alone
        fits = kind == SPARSE and most + more <= limit
        joins = fits and start == end and rows == order[first][0]
        if number > first and not joins:
            yield slice(first, number), counts
            first, most, counts = number, 0, []
        most, end = most + more, start + sum(here) * at.block
        counts.append(here)
    yield slice(first, len(order)), counts


def _ranges(ids: Tensor, size: int, tail: int, limit: int) -> Iterator[slice]:
    """[0, size) in ranges with at most `limit` of `ids`, as far as a single id lets them.

    Each is some whole tail tiles, or a part of one.
    """
    below = F.pad(torch.bincount(ids, minlength=size).cumsum(0), (1, 0)).cpu()
    start = 0
    while start < size:
        fits = int(torch.searchsorted(below, below[start] + limit, right=True)) - 1
        stop, end_of_tile = min(max(fits, start + 1), size), (start // tail + 1) * tail
        if start % tail or stop < end_of_tile:
            stop = min(stop, end_of_tile)
        elif stop < size:
            stop = stop // tail * tail
        yield slice(start, stop)
        start = stop


class _Totals:
    """The sums that tiles add to."""

    def __init__(
        self, head: Head, row_gradient: RowGradient, needs: tuple[bool, bool, bool], at: Tiling
    ) -> None:
        self.head, self.at, self.needs = head, at, needs
        n, width = head.hidden.shape
        like, self.wide = head.hidden, wide_dtype(head.hidden.dtype)
        self.target = row_gradient.target
        self.norm, self.coef = row_gradient.norm, row_gradient.coef
        self.dead = (self.coef == 0).all(0)  # rows without upstream gradient
        profile = TailProfile(head, row_gradient, at.options.threshold)
        self.profile = profile.of(head, slice(0, head.vocabulary))
        self.hidden = Sum((n, width), like) if needs[0] else None
        self.base = like.new_zeros((at.tails(slice(0, head.vocabulary)).stop, n), dtype=self.wide)
        self.wide_hidden = like.to(self.wide) if needs[1] else None
        self.weight = self.bias = None
        if needs[1]:
            self.weight = head.weight.new_empty((head.vocabulary, width))
        if needs[2]:
            self.bias = like.new_zeros(head.vocabulary, dtype=self.wide)
        self.rooms = active.Rooms()
        # Vendor products of 16-bit matrices want plain operands and make a new kernel, in
        # milliseconds, for every new size: numbers of columns go in steps of 32.
        self.flip = head.backend.wants_transpose(like.dtype)
        self.transposed: Transposed | None = None
        # (columns, D): the sum of dW over tiles of some columns, where there is more than one.
        self.chunk: Tensor | None = None
        self.fresh = True  # nothing is in `chunk` yet
        self.written = False  # these columns of `weight` were written as a whole

    def _rows_of(self, rows: slice, block: int) -> slice:
        """The rows of a block, counted from the first row of its tile."""
        start = rows.start + block * self.at.block
        return slice(start, min(start + self.at.block, rows.stop))

    # --- tiles that are there whole ---------------------------------------------------------------

    def add_whole(self, tile: Tile, mark: bool) -> None:
        """A tile of products, which it consumes; by active columns if `mark` and they are few."""
        head, at, (rows, columns, product) = self.head, self.at, tile
        if mark:
            norm = self.norm[:, rows]
            reference, marks = active.mark(head, at, tile, self.target, norm[0], norm[1])
            counts = marks.sum(1).tolist()
            if sum(counts) < DENSE_SHARE * marks.numel():
                store = self.rooms.take("store", head, sum(counts) * at.block).view(-1, at.block)
                tails = self.base.new_empty((4, *self.base[at.tails(columns), rows].shape))
                tails[REFERENCE] = reference
                active.collect(head, at, tile, marks, store, tails)
                self.add_tails(rows, columns, marks, tails)
                self.add_sparse(rows, [columns], [counts], marks, store)
                return
        if self.transposed is None and self.needs[1] and self.flip:
            self.transposed = Transposed(head, at.columns, min(at.rows, head.hidden.shape[0]))
        flipped = None if self.transposed is None else self.transposed.of(product)
        head.backend.dlogits_(
            product, head.bias_chunk(columns), head.transform, self.target[rows], columns.start,
            self.norm[:, rows], self.coef[:, rows], flipped,
        )  # fmt: skip
        if self.hidden is not None:
            self.hidden.add(rows, product, head.weight_chunk(columns))
        if self.weight is not None:
            self._add_dense_weight(rows, columns, product.T if flipped is None else flipped)
        if self.bias is not None:
            self.bias[columns] += product.sum(0, dtype=self.bias.dtype)

    def _add_dense_weight(self, rows: slice, columns: slice, flipped: Tensor) -> None:
        assert self.weight is not None
        hidden, out = self.head.hidden[rows], self.weight[columns]
        whole = rows == slice(0, self.head.hidden.shape[0])
        if whole and out.dtype == flipped.dtype:
            torch.mm(flipped, hidden, out=out)
            self.written = True
            return
        chunk = self._started(columns)
        if flipped.dtype == chunk.dtype:
            chunk.addmm_(flipped, hidden)
        else:
            chunk.add_(torch.mm(flipped, hidden))

    def _started(self, columns: slice) -> Tensor:
        """The sum of dW over this chunk, zero if nothing was added yet."""
        if self.chunk is None:
            shape = min(self.at.columns, self.head.vocabulary), self.head.weight.shape[1]
            self.chunk = self.base.new_empty(shape)
        chunk = self.chunk[: columns.stop - columns.start]
        if self.fresh:
            chunk.zero_()
            self.fresh = False
        return chunk

    # --- tiles of which active columns are there --------------------------------------------------

    def add_tails(self, rows: slice, columns: slice, marks: Tensor, tails: Tensor) -> None:
        """The gradient of every tail tile of these columns over its profile, and its share of db.

        Before the active columns are added. Of tiles that left nothing, or everything, the sums in
        `tails` are 0; those that are formed again have theirs added then.
        """
        at = self.at
        at_once = max(at.parts // 256 // (rows.stop - rows.start), 1)
        for part in slices(columns.start, columns.stop, at_once * at.tail):
            where = at.tails(part)
            here = slice(part.start - columns.start, part.stop - columns.start)
            base = self._tail_gradient(rows, part, marks[:, here], tails[:, at.tails(here)])
            self.base[where, rows] = base
            if self.bias is not None:
                width = part.stop - part.start
                spread = base.sum(1).repeat_interleave(at.tail)[:width]
                self.bias[part] += spread * self.profile[part]

    def add_sparse(
        self,
        rows: slice,
        tiles: list[slice],
        counts: list[list[int]],
        marks: Tensor,
        store: Tensor,
    ) -> None:
        """Active columns `store`, which it consumes, of a run of tiles, see `_together`.

        `marks` of all their columns; the gradient of their tails is there already.
        """
        head, at = self.head, self.at
        size, columns = rows.stop - rows.start, slice(tiles[0].start, tiles[-1].stop)
        inside = [slice(t.start - columns.start, t.stop - columns.start) for t in tiles]
        padding = (0, -size % at.block)
        norm, coef = (F.pad(v[:, rows], padding) for v in (self.norm, self.coef))
        base = F.pad(self.base[at.tails(columns), rows], padding)
        of_blocks = [sum(of_tiles) for of_tiles in zip(*counts, strict=True)]
        widths = [-(-count // 32) * 32 for count in of_blocks]
        row_major = None
        if self.flip and self.hidden is not None:
            row_major = self.rooms.take("rows", head, at.block * sum(widths))
        # In the order of the store: tile after tile, then block after block.
        found = [marks[:, some].nonzero() for some in inside]
        for of_tile, some in zip(found, inside, strict=True):
            of_tile[:, 1] += some.start
        pairs = torch.cat(found)
        del found, of_tile
        head.backend.active_gradient_(
            store, pairs, size, head.bias_chunk(columns), head.transform, self.target[rows],
            columns.start, norm, coef, base, at.tail, self.profile[columns], row_major,
        )  # fmt: skip
        if self.weight is not None:
            assert self.wide_hidden is not None
            common = self.base[at.tails(columns), rows] @ self.wide_hidden[rows]
            first = 0
            for tile, some, here in zip(tiles, inside, counts, strict=True):
                ids = pairs[first : first + sum(here), 1] - some.start
                self._add_sparse_weight(
                    rows, tile, here, marks[:, some], ids, store[first:], common[at.tails(some)]
                )
                first += sum(here)
        if self.bias is not None:
            sums = store.sum(1, dtype=self.bias.dtype)
            self.bias[columns].index_add_(0, pairs[:, 1], sums)
        if self.hidden is None:
            return
        weight, first, written = head.weight_chunk(columns), 0, 0
        of_run = pairs if len(tiles) == 1 else marks.nonzero()  # block after block
        for number, ids in enumerate(of_run[:, 1].split(of_blocks)):
            if not len(ids):
                continue
            block, width = self._rows_of(rows, number), len(ids)
            dz = store[first : first + width, : block.stop - block.start].T
            first += width
            if row_major is not None:
                width = widths[number]
                dz = row_major[written : written + at.block * width].view(at.block, width)
                dz = dz[: block.stop - block.start]
                written += at.block * width
            self.hidden.add(block, dz, self.rooms.head_rows(head, weight, ids, width))

    def _add_sparse_weight(
        self,
        rows: slice,
        columns: slice,
        counts: list[int],
        marks: Tensor,
        ids: Tensor,
        store: Tensor,
        common: Tensor,
    ) -> None:
        """DW of a tile: by ranges of ids, so that the products of a range stay in cache.

        What follows in `store` is that of other tiles.
        """
        head, at = self.head, self.at
        assert self.weight is not None
        whole = rows == slice(0, head.hidden.shape[0])
        out = self.weight[columns] if whole else self._started(columns)
        self.written = self.written or whole
        size, width = columns.stop - columns.start, common.shape[1]
        starts = [0, *accumulate(counts)]  # of what is left of each block
        for some in _ranges(ids, size, at.tail, at.parts // width):
            inside = counts if some == slice(0, size) else marks[:, some].sum(1).tolist()
            parts = self.rooms.take("parts", head, (sum(inside) + 31) * width).view(-1, width)
            done, of_parts = 0, [ids[:0]]
            for block, count in enumerate(inside):
                if not count:
                    continue
                at_rows, first = self._rows_of(rows, block), starts[block]
                # Columns that follow are overwritten or left out; see `self.flip`.
                more = -(-count // 32) * 32 if self.flip else count
                more = min(more, store.shape[0] - first)
                dz = store[first : first + more, : at_rows.stop - at_rows.start]
                torch.mm(dz, head.hidden[at_rows], out=parts[done : done + more])
                of_parts.append(ids[first : first + count])
                starts[block] += count
                done += count
            head.backend.combine_rows(
                parts[:done], torch.cat(of_parts) - some.start,
                common[some.start // at.tail : -(-some.stop // at.tail)], at.tail,
                self.profile[columns][some], out[some], not whole,
            )  # fmt: skip

    def _tail_gradient(self, rows: slice, columns: slice, marks: Tensor, tails: Tensor) -> Tensor:
        """(tail tiles, rows): the gradient of each tail, over the sum of its profile."""
        transform, at = self.head.transform, self.at
        norm, (_, one, per_log_p, flat) = self.norm[:, rows], self.coef[:, rows]
        # Sums relative to a reference → sums of p and p·log p.
        shift = (tails[REFERENCE] - norm[0]) - norm[1]
        mass, mass_z = tails[MASS], tails[MASS_Z]
        log_mass = torch.where(per_log_p == 0, 0.0, per_log_p * (mass_z + shift * mass))
        nothing = mass == 0  # 0 times an overflow of exp(shift) must stay 0
        gradient = torch.where(nothing, 0.0, shift.exp() * (one * mass + log_mass))
        gradient = gradient + torch.where(flat == 0, 0.0, flat * tails[SLOPES])
        inactive = torch.where(marks == 0, self.profile[columns], 0.0)
        inactive = F.pad(inactive, (0, -marks.shape[1] % at.tail)).view(len(marks), -1, at.tail)
        spread = inactive.sum(2).T.repeat_interleave(at.block, 1)[:, : shift.shape[1]]
        gradient = gradient * (transform.scale / transform.temperature) / spread
        return torch.where(self.dead[rows] | (spread == 0), 0.0, gradient)

    # --- the end ----------------------------------------------------------------------------------

    def finish(self, columns: slice) -> None:
        """All tiles of these columns have been added."""
        if self.weight is not None and not self.written:
            self.weight[columns] = self._started(columns)
        self.fresh, self.written = True, False

    def results(self, hidden_dtype: torch.dtype) -> Results:
        hidden = None
        if self.hidden is not None:
            sums = self.head.backend.tile_sums(self.head.weight, self.at.tail, self.profile)
            hidden = self.hidden.total.addmm_(self.base.T, sums.to(self.wide)).to(hidden_dtype)
        return hidden, self.weight, self.bias
