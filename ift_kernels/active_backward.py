"""Gradients from an active set: what is kept of a tile decides how its share is formed.

Read `ift_kernels.active` first. Tile by tile, each with the vocabulary ids of its columns: products
that are there whole give dense gradients, active columns give sparse ones, and what was not kept is
computed again and then treated as either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
from ift_kernels.engine import Head, Results, RowGradient, Tile, Transposed
from ift_kernels.sums import Sum, wide_dtype


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
    for (rows, columns), (kind, start, _) in zip(order, layout, strict=True):
        if kind == SPARSE:
            marks = formed.marks[at.blocks(rows), columns]
            count = int(marks.sum())
            store = formed.store[start : start + count * at.block].view(count, at.block)
            tails = formed.tails[:, at.tails(columns), rows]
            total.add_sparse(rows, columns, marks, store, tails)
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
            count = int(marks.sum())
            if count < DENSE_SHARE * marks.numel():
                store = self.rooms.take("store", head, count * at.block).view(count, at.block)
                tails = self.base.new_empty((4, *self.base[at.tails(columns), rows].shape))
                tails[REFERENCE] = reference
                active.collect(head, at, tile, marks, store, tails)
                self.add_sparse(rows, columns, marks, store, tails)
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

    def add_sparse(
        self, rows: slice, columns: slice, marks: Tensor, store: Tensor, tails: Tensor
    ) -> None:
        """Active columns `store` of a tile, which it consumes, and the sums of its tail."""
        head, at = self.head, self.at
        size = rows.stop - rows.start
        self._add_base(rows, columns, marks, tails)
        padding = (0, -size % at.block)
        norm, coef = (F.pad(v[:, rows], padding) for v in (self.norm, self.coef))
        base = F.pad(self.base[at.tails(columns), rows], padding)
        counts = marks.sum(1).tolist()
        row_major = None
        if self.flip and self.hidden is not None:
            row_major = self.rooms.take(
                "rows", head, at.block * sum(-(-c // 32) * 32 for c in counts)
            )
        pairs = marks.nonzero().contiguous()
        head.backend.active_gradient_(
            store, pairs, size, head.bias_chunk(columns), head.transform, self.target[rows],
            columns.start, norm, coef, base, at.tail, row_major,
        )  # fmt: skip
        weight = head.weight_chunk(columns)
        first = written = 0
        for number, count in enumerate(counts):
            if not count:
                continue
            block = self._rows_of(rows, number)
            ids = pairs[first : first + count, 1].contiguous()
            dz = store[first : first + count, : block.stop - block.start].T
            first += count
            if self.hidden is not None:
                if row_major is not None:
                    width = -(-count // 32) * 32
                    dz = row_major[written : written + at.block * width].view(at.block, width)
                    dz = dz[: block.stop - block.start]
                    written += at.block * width
                    # Columns of zeros up to `width`, against a head row that is active anyway.
                    ids = torch.cat([ids, ids[-1:].expand(width - count)])
                gathered = self.rooms.take("head", head, len(ids) * weight.shape[1]).view(
                    len(ids), -1
                )
                self.hidden.add(block, dz, torch.index_select(weight, 0, ids, out=gathered))
        if self.weight is not None:
            self._add_sparse_weight(rows, columns, pairs, store)
        if self.bias is not None:
            sums = store.sum(1, dtype=self.bias.dtype)
            self.bias[columns].index_add_(0, pairs[:, 1], sums)

    def _add_base(self, rows: slice, columns: slice, marks: Tensor, tails: Tensor) -> None:
        """The mean gradient over the tail of each tail tile, and its share of dW and db."""
        at = self.at
        where = at.tails(columns)
        base = self._mean_gradient(rows, columns, marks, tails)
        self.base[where, rows] = base
        if self.bias is not None:
            width = columns.stop - columns.start
            self.bias[columns] += base.sum(1).repeat_interleave(at.tail)[:width]

    def _add_sparse_weight(self, rows: slice, columns: slice, pairs: Tensor, store: Tensor) -> None:
        """DW of these columns: by ranges of ids, so that the products of a range stay in cache."""
        head, at = self.head, self.at
        assert self.wide_hidden is not None and self.weight is not None
        common = self.base[at.tails(columns), rows] @ self.wide_hidden[rows]
        whole = rows == slice(0, head.hidden.shape[0])
        out = self.weight[columns] if whole else self._started(columns)
        self.written = self.written or whole
        size, width = columns.stop - columns.start, common.shape[1]
        number, ids = pairs.T.contiguous()
        for some in _ranges(ids, size, at.tail, at.parts // width):
            inside = ((ids >= some.start) & (ids < some.stop)).nonzero()[:, 0]
            parts = self.rooms.take("parts", head, (inside.shape[0] + 31) * width).view(-1, width)
            done = 0
            counts = torch.bincount(number[inside], minlength=1).tolist()
            for block, count in enumerate(counts):
                if count:
                    first = int(inside[done])
                    at_rows = self._rows_of(rows, block)
                    # Columns that follow are overwritten or left out; see `self.flip`.
                    more = -(-count // 32) * 32 if self.flip else count
                    more = min(more, store.shape[0] - first)
                    dz = store[first : first + more, : at_rows.stop - at_rows.start]
                    torch.mm(dz, head.hidden[at_rows], out=parts[done : done + more])
                    done += count
            head.backend.combine_rows(
                parts[:done], ids[inside] - some.start,
                common[some.start // at.tail : -(-some.stop // at.tail)], at.tail, out[some],
                not whole,
            )  # fmt: skip

    def _mean_gradient(self, rows: slice, columns: slice, marks: Tensor, tails: Tensor) -> Tensor:
        """(tail tiles, rows): the mean gradient of products in the tail of each tail tile."""
        transform, at = self.head.transform, self.at
        norm, (_, one, per_log_p, flat) = self.norm[:, rows], self.coef[:, rows]
        # Sums relative to a reference → sums of p and p·log p.
        shift = (tails[REFERENCE] - norm[0]) - norm[1]
        mass, mass_z = tails[MASS], tails[MASS_Z]
        log_mass = torch.where(per_log_p == 0, 0.0, per_log_p * (mass_z + shift * mass))
        nothing = mass == 0  # 0 times an overflow of exp(shift) must stay 0
        gradient = torch.where(nothing, 0.0, shift.exp() * (one * mass + log_mass))
        gradient = gradient + torch.where(flat == 0, 0.0, flat * tails[SLOPES])
        inactive = F.pad(marks == 0, (0, -marks.shape[1] % at.tail)) \
            .view(marks.shape[0], -1, at.tail).sum(2)  # fmt: skip
        inactive = inactive.T.repeat_interleave(at.block, 1)[:, : shift.shape[1]]
        gradient = gradient * (transform.scale / transform.temperature) / inactive.clamp(min=1)
        return torch.where(self.dead[rows] | (inactive == 0), 0.0, gradient)

    # --- the end ----------------------------------------------------------------------------------

    def finish(self, columns: slice) -> None:
        """All tiles of these columns have been added."""
        if self.weight is not None and not self.written:
            self.weight[columns] = self._started(columns)
        self.fresh, self.written = True, False

    def results(self, hidden_dtype: torch.dtype) -> Results:
        hidden = None
        if self.hidden is not None:
            sums = self.head.backend.tile_sums(self.head.weight, self.at.tail)
            hidden = self.hidden.total.addmm_(self.base.T, sums.to(self.wide)).to(hidden_dtype)
        return hidden, self.weight, self.bias
