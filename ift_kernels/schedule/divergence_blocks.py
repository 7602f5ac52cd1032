"""Passes of `linear_divergence` over its products; `divergence_plan` documents the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ift_kernels.backends import contract, reference
from ift_kernels.backends.contract import Chunk
from ift_kernels.common.head_rows import is_dense
from ift_kernels.schedule.accumulate import Sum, accum_dtype, add_column_sums
from ift_kernels.schedule.divergence_plan import Heads, Layout, Needs, in_place, layout
from ift_kernels.schedule.gradients import Gradients
from ift_kernels.schedule.head import Head, Results, Tile, slices

Pair = tuple[Chunk, Chunk]  # of student and teacher


class Products:
    """The products of both heads: of blocks that keep them, and of sweeps."""

    def __init__(self, heads: Heads, sizes: Layout) -> None:
        self.heads, self.sizes = heads, sizes
        self.rows = heads[0].hidden.shape[0]
        same = heads[0].backend is heads[1].backend
        self.backend = heads[0].backend if same else reference  # of both at once
        self.held = self.rest = self.teacher = heads[0].hidden.new_empty(0)

    def blocks(self) -> Iterator[slice]:
        """Rows of all blocks, whose products are then `formed` and read again by `tiles`."""
        block, vocabulary = min(self.sizes.block, self.rows), self.heads[0].vocabulary
        self.held = self.heads[0].buffer(self.rows, self.sizes.held)
        self.rest = self.heads[0].buffer(block, vocabulary - self.sizes.held)
        self.teacher = self.heads[1].buffer(block, vocabulary)
        yield from slices(0, self.rows, max(block, 1))
        self.rest = self.teacher = self.held.new_empty(0)

    def tiles(self, rows: slice) -> Iterator[tuple[slice, Pair]]:
        """Columns and products of a block's tiles."""
        held, count = self.sizes.held, rows.stop - rows.start
        for columns in slices(0, self.heads[0].vocabulary, self.sizes.block_columns):
            if columns.stop <= held:
                student = self.held[rows, columns]
            else:
                student = self.rest[:count, columns.start - held : columns.stop - held]
            yield columns, self._pair(rows, columns, student, self.teacher[:count, columns])

    def formed(self, rows: slice) -> Iterator[tuple[slice, Pair]]:
        """The tiles of a block, each formed first."""
        for columns, pair in self.tiles(rows):
            for head, chunk in zip(self.heads, pair, strict=True):
                head.multiply(columns, chunk.x, rows)
            yield columns, pair

    def gradients(self, rows: slice) -> list[tuple[slice, Tensor]]:
        """What a block's products have become, by whole ranges of columns."""
        held, count = self.sizes.held, rows.stop - rows.start
        parts = (slice(0, held), self.held[rows]), (
            slice(held, self.heads[0].vocabulary), self.rest[:count],
        )  # fmt: skip
        return [(columns, part) for columns, part in parts if columns.stop > columns.start]

    def held_tiles(self) -> Iterator[Tile]:
        """The gradients that blocks have left, for dW."""
        for columns in slices(0, self.sizes.held, self.sizes.tile_columns):
            for rows in slices(0, self.rows, self.sizes.tile_rows):
                yield Tile(rows, columns, self.held[rows, columns])

    def sweep(self, over: slice, first: int = 0) -> Iterator[tuple[slice, slice, Pair]]:
        """Rows, columns from `first` on, and products formed anew, the vocabulary outermost."""
        if first == self.heads[0].vocabulary:
            return
        tile_rows = min(self.sizes.tile_rows, over.stop - over.start)
        scratch = [head.buffer(tile_rows, self.sizes.tile_columns) for head in self.heads]
        for columns in slices(first, self.heads[0].vocabulary, self.sizes.tile_columns):
            width = columns.stop - columns.start
            scratch[0][:, width:] = 0  # as in empty_padded, for a narrower last tile
            for rows in slices(over.start, over.stop, max(tile_rows, 1)):
                products = [some[: rows.stop - rows.start, :width] for some in scratch]
                for head, product in zip(self.heads, products, strict=True):
                    head.multiply(columns, product, rows)
                yield rows, columns, self._pair(rows, columns, *products)

    def _pair(self, rows: slice, columns: slice, *products: Tensor) -> Pair:
        student, teacher = (
            head.chunk(Tile(rows, columns, product))
            for head, product in zip(self.heads, products, strict=True)
        )
        return student, teacher


class Norm:
    """Both heads' running statistics of some rows."""

    def __init__(self, heads: Heads, rows: int) -> None:
        self.heads = heads
        self.states = [contract.new_state(rows, head.hidden.device) for head in heads]
        self.no_target = torch.full((rows,), -1, device=heads[0].hidden.device)

    def update(self, rows: slice, pair: Pair) -> None:
        for head, chunk, state in zip(self.heads, pair, self.states, strict=True):
            head.backend.stats_update(chunk, self.no_target[rows], state.rows(rows), 0)

    def result(self) -> Tensor:
        """Maximum and log of the sum of exponentials, (2 heads, 2, rows)."""
        both = [
            torch.stack([values[contract.MAX], values[contract.SUM].log()])
            for values, _ in self.states
        ]
        return torch.stack(both).to(accum_dtype(self.heads[0].hidden.dtype))


@dataclass(frozen=True)
class Rows:
    """What is known of each row, or summed over the tiles."""

    value: Tensor  # (N,) float64
    centre: Tensor  # (N,) float64
    norm: Tensor  # (2, 2, N)
    upstream: Tensor | None  # (N,)

    def part(self, rows: slice) -> Rows:
        upstream = None if self.upstream is None else self.upstream[rows]
        return Rows(self.value[rows], self.centre[rows], self.norm[..., rows], upstream)


class Divergence:
    """The passes of a call over its products."""

    def __init__(
        self,
        heads: Heads,
        workspace: int,
        kind: str,
        beta: float,
        needs: Needs,
        hidden_dtype: torch.dtype,
    ) -> None:
        self.kind, self.beta, self.needs, self.hidden_dtype = kind, beta, needs, hidden_dtype
        self.head = heads[0]
        self.sizes = layout(heads, workspace, needs[0], needs[1])
        self.products = Products(heads, self.sizes)
        self.every = slice(0, heads[0].hidden.shape[0])

    def values(self, given: Rows) -> None:
        """Norm, value and centre of all rows."""
        if self.sizes.block:
            for rows in self.products.blocks():
                self._norm(rows, given)
                for _, pair in self.products.tiles(rows):
                    self._terms(pair, given.part(rows))
            return
        self._swept_values(given)

    def values_and_gradients(self, given: Rows) -> Results:
        """The same, and the gradients by `given.upstream`."""
        if not self.sizes.block:
            self._swept_values(given)
            return self.gradients(given)
        total = self._total((False, *self.needs[1:]))
        hidden: Tensor | None = None
        if self.needs[0]:
            hidden = self.head.hidden.new_empty(self.head.hidden.shape, dtype=self.hidden_dtype)
        for rows in self.products.blocks():
            part = given.part(rows)
            self._norm(rows, given)
            if self.kind != "forward":  # whose gradient needs no centre: its value comes with it
                for _, pair in self.products.tiles(rows):
                    self._terms(pair, part)
            for columns, pair in self.products.tiles(rows):
                scaled = self._scaled_copy(pair)
                self._gradient(pair, part, with_value=self.kind == "forward")
                if total.bias is not None:
                    add_column_sums(total.bias[columns], pair[0].x)
                self._add_adapter(rows, columns, pair, scaled)
                if total.weight is not None and in_place(self.head):
                    self._add_weight_in_place(total.weight[columns], rows, pair[0].x)
            if hidden is not None:
                hidden[rows] = self._hidden(rows)
        if total.weight is not None and not in_place(self.head):
            self._finish_weight(total, given)
        return hidden, total.weight, total.bias

    def gradients(self, given: Rows) -> Results:
        """Gradients from known norm and centre: one sweep, or one for dh by rows and one for dW."""
        n, needs = self.every.stop, self.needs
        hidden: Tensor | None = None
        if needs[0] and self.sizes.hidden_rows < n:
            hidden = self.head.hidden.new_empty(self.head.hidden.shape, dtype=self.hidden_dtype)
            for rows in slices(0, n, self.sizes.hidden_rows):
                (part, *_) = self._sweep(rows, (True, False, False), given)
                hidden[rows] = part  # type: ignore[assignment]  # asked for above
            needs, self.head = (False, *needs[1:]), self.head.without_adapter_sums()
        adapted = self.head.adapter is not None and self.head.adapter.has_sums
        if not any(needs) and not adapted:
            return hidden, None, None
        swept, weight, bias = self._sweep(self.every, needs, given)
        return swept if hidden is None else hidden, weight, bias

    def _swept_values(self, given: Rows) -> None:
        norm = Norm(self.products.heads, self.every.stop)
        for rows, _, pair in self.products.sweep(self.every):
            norm.update(rows, pair)
        given.norm.copy_(norm.result())
        for rows, _, pair in self.products.sweep(self.every):
            self._terms(pair, given.part(rows))

    def _norm(self, rows: slice, given: Rows) -> None:
        norm = Norm(self.products.heads, rows.stop - rows.start)
        for _, pair in self.products.formed(rows):
            norm.update(slice(None), pair)
        given.norm[..., rows] = norm.result()

    def _terms(self, pair: Pair, given: Rows) -> None:
        self.products.backend.divergence_terms(
            *pair, self.kind, self.beta, given.norm, given.value, given.centre
        )

    def _gradient(self, pair: Pair, given: Rows, with_value: bool = False) -> None:
        assert given.upstream is not None
        value = given.value if with_value else None
        self.products.backend.divergence_gradient_(
            *pair, self.kind, self.beta, given.norm, given.centre, given.upstream, value
        )

    def _total(self, needs: Needs, head: Head | None = None) -> Gradients:
        head = self.head if head is None else head
        rows = min(self.sizes.tile_rows, head.hidden.shape[0])
        total = Gradients(head, needs, self.hidden_dtype, self.sizes.tile_columns, rows)
        if not head.hidden.shape[0] and total.weight is not None:
            total.weight.zero_()
        return total

    def _hidden(self, rows: slice) -> Tensor:
        """dh of a block; by whole ranges of columns, for vendor GEMMs want a long inner size."""
        parts = self.products.gradients(rows)
        if not is_dense(self.head.weight, self.head.dtype):  # it or the gradient is cast by tiles
            parts = [(columns, pair[0].x) for columns, pair in self.products.tiles(rows)]
        size = rows.stop - rows.start, self.head.hidden.shape[1]
        total = Sum(size, self.head.hidden, self.head.vocabulary)
        for columns, part in parts:
            total.add(slice(None), self.head.rounded(part), self.head.weight_chunk(columns))
        return total.total

    def _add_weight_in_place(self, out: Tensor, rows: slice, product: Tensor) -> None:
        if rows.start == 0:
            torch.mm(product.T, self.head.hidden[rows], out=out)
        else:
            out.addmm_(product.T, self.head.hidden[rows])

    def _finish_weight(self, total: Gradients, given: Rows) -> None:
        for rows, columns, gradient in self.products.held_tiles():
            self._add_weight(total, rows, columns, gradient)
        self.head = self.head.without_adapter_sums()
        for rows, columns, pair in self.products.sweep(self.every, self.sizes.held):
            self._gradient(pair, given.part(rows))
            self._add_adapter(rows, columns, pair, None)
            self._add_weight(total, rows, columns, pair[0].x)

    def _add_weight(self, total: Gradients, rows: slice, columns: slice, gradient: Tensor) -> None:
        transposed = None if total.transposed is None else total.transposed.of(gradient)
        if transposed is None:
            transposed = self.head.rounded(gradient).T
        else:
            self.head.backend.transpose(gradient, transposed)
        total.add_weight(rows, columns, transposed)

    def _sweep(self, over: slice, needs: Needs, given: Rows) -> Results:
        total = self._total(needs, self.head.rows(over))
        for rows, columns, pair in self.products.sweep(over):
            scaled = self._scaled_copy(pair)
            self._gradient(pair, given.part(rows))
            if total.bias is not None:
                add_column_sums(total.bias[columns], pair[0].x)
            self._add_adapter(rows, columns, pair, scaled)
            gradient = self.head.rounded(pair[0].x)
            if total.hidden is not None:
                here = slice(rows.start - over.start, rows.stop - over.start)
                total.hidden.add(here, gradient, self.head.weight_chunk(columns))
            if total.weight is not None:
                self._add_weight(total, rows, columns, gradient)
        return total.results()

    def _scaled_copy(self, pair: Pair) -> Tensor | None:
        adapter = self.head.adapter
        return None if adapter is None else adapter.copy(pair[0].x)

    def _add_adapter(self, rows: slice, columns: slice, pair: Pair, scaled: Tensor | None) -> None:
        if self.head.adapter is not None:
            self.head.adapter.add(rows, columns, pair[0].x, None, scaled)
