"""Gradients of the head, tile by tile: a backend overwrites a product by its own gradient.

Which schedule runs when, and how much memory it takes, is in `plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ift_kernels.backends.contract import ActiveColumns, RowGradient
from ift_kernels.common.head_rows import is_dense
from ift_kernels.schedule import exponentials
from ift_kernels.schedule.accumulate import (
    Sum,
    SumInResult,
    accum_dtype,
    add_column_sums,
    common_factor,
)
from ift_kernels.schedule.active import ActiveHidden
from ift_kernels.schedule.head import Head, Results, Tile, slices
from ift_kernels.schedule.plan import Plan
from ift_kernels.schedule.products import parked_tile, recomputed_tiles, statistics


class Transposed:
    """Where a backend that wants it writes a tile's gradient transposed, tile after tile."""

    def __init__(self, head: Head, columns: int, rows: int) -> None:
        # Whole cache lines; one more keeps long rows off powers of two, where all would fall into
        # the same cache sets.
        width = -(-rows // 32) * 32 + (32 if rows >= 256 else 0)
        buffer = head.backend.scratch(head.hidden, columns * width)
        self._buffer: Tensor = buffer.view(columns, width)

    def of(self, product: Tensor) -> Tensor:
        """(columns, rows) for this tile, with zeros where a product reads on: see empty_padded."""
        rows, columns = product.shape
        self._buffer[:, rows:][:, : -rows % 32] = 0
        return self._buffer[:columns, :rows]


class Gradients:
    """Accumulates the gradients of hidden, weight and bias, tile by tile."""

    def __init__(
        self,
        head: Head,
        needs: tuple[bool, bool, bool],
        hidden_dtype: torch.dtype,
        tile_columns: int,
        tile_rows: int,
        into: Tensor | None = None,
        active: ActiveHidden | None = None,
        sum_columns: int = 0,
        factor: Tensor | None = None,
    ) -> None:
        """`into`: preferred buffer of hidden's gradient, see `Sum`; `active`: it is formed from
        active columns only; `sum_columns`: weight's is a float32 sum over blocks of rows, of the
        first columns; nothing is added for the others; `factor`: of the results, missing in the
        coefficients, see `common_factor`.
        """
        self.head, self.hidden_dtype, self.factor = head, hidden_dtype, factor
        self.active = active if needs[0] else None
        n, width = head.hidden.shape
        like = head.hidden
        self.hidden: Sum | None = None
        if needs[0]:
            self.hidden = Sum((n, width), like, head.vocabulary, into, factor)
        self.weight, self.adds = None, False
        self.weight_sum: SumInResult | None = None
        if needs[1]:
            self.weight = head.weight.new_empty((head.vocabulary, width))
            if sum_columns:
                self.weight_sum = SumInResult(self.weight, sum_columns, factor)
        self.bias = None
        if needs[2]:
            self.bias = like.new_zeros(head.vocabulary, dtype=accum_dtype(like.dtype))
        self.chunk_sum: Sum | None = None
        self.transposed: Transposed | None = None
        if needs[1] and head.backend.wants_transpose(head.dtype):
            self.transposed = Transposed(head, tile_columns, tile_rows)

    @property
    def stays_products(self) -> bool:
        """Whether kept products become gradients only where active columns are taken from them.

        That is one read and one write less on a GPU; on a CPU a tile is still in cache.
        """
        others = self.weight is None and self.weight_sum is None and self.bias is None
        return self.active is not None and others and self.active.on_gpu

    def restart(self, head: Head, into: Tensor | None) -> None:
        """Switch to other rows: hidden's gradient restarts, those of weight and bias accumulate."""
        self.head, self.adds = head, True
        if self.hidden is not None:
            self.hidden.restart(head.hidden.shape[0], into)

    def add(
        self, tile: Tile, row_gradient: RowGradient, hidden_too: bool = True
    ) -> ActiveColumns | None:
        """Turn the tile into its gradient, in place, and add its share of every sum.

        Returns what is active, where hidden's gradient is from active columns; kept products may
        stay what they are until `ActiveHidden.add_kept`.
        """
        head, (rows, columns, product) = self.head, tile
        marked = None
        if self.active is not None:  # while the products are there
            marked = self.active.mark(head, tile, row_gradient, hidden_too)
            if marked is not None and not hidden_too and self.stays_products:
                return marked
        transposed = None if self.transposed is None else self.transposed.of(product)
        adapter = head.adapter
        scaled = None if adapter is None else adapter.copy(product)
        head.backend.dlogits_(head.chunk(tile), row_gradient.rows(rows), transposed)
        if head.selected is not None:
            head.backend.put_selected(head.chunk(tile), head.selected.rows(rows), transposed)
        if self.bias is not None:
            add_column_sums(self.bias[columns], product)
        if adapter is not None:
            adapter.add(rows, columns, product, transposed, scaled)
        gradient = head.rounded(product)
        if transposed is None:
            transposed = gradient.T
        if self.hidden is not None and hidden_too:
            if self.active is None or marked is None:
                self.hidden.add(rows, gradient, head.weight_chunk(columns))
            else:
                self.active.add(head, tile, marked, self.hidden)
        if self.weight_sum is not None:
            self.weight_sum.add(columns, transposed, head.hidden[rows])
        elif self.weight is not None:
            self.add_weight(rows, columns, transposed)
        return marked

    def consume(self, kept: Tensor, row_gradient: RowGradient, plan: Plan, start: int = 0) -> None:
        """The same for the columns from `start` on whose products of all rows are `kept`."""
        rows, stop, tile_columns = slice(0, len(kept)), start + kept.shape[1], plan.tile_columns
        # dh from all of them in one product: vendor GEMMs want a long inner size (oneDNN is twice
        # as fast from 16k on as at 4k), and it is rounded once. Not where that means a cast of the
        # head or of the gradient, nor where products are of one size.
        whole = is_dense(self.head.weight, kept.dtype) and not plan.product_rows
        if whole and self.stays_products:  # one pass of all columns
            tile_columns = kept.shape[1]
        tiles = (
            (columns, self.add(Tile(some, columns, product), row_gradient, not whole))
            for columns in slices(start, stop, tile_columns)
            for some in plan.product_slices(len(kept))
            for product in [kept[some, columns.start - start : columns.stop - start]]
        )
        if self.active is not None and self.hidden is not None and whole:
            of = row_gradient if self.stays_products else None
            self.active.add_kept(self.head, kept, tiles, tile_columns, self.hidden, of)
            return
        for _ in tiles:
            pass
        if self.hidden is not None and whole:
            self.hidden.add(rows, kept, self.head.weight[start:stop])

    def consume_parked(self, kept: Tensor, row_gradient: RowGradient, plan: Plan) -> None:
        """The same for the other columns, whose products are in dW: moved to `kept`, in turn."""
        assert self.weight is not None
        rows, width = kept.shape
        for group in slices(width, self.head.vocabulary, width):
            part = kept[:, : group.stop - group.start]
            for columns in slices(group.start, group.stop, plan.tile_columns):
                moved = part[:, columns.start - group.start : columns.stop - group.start]
                moved.copy_(parked_tile(self.weight, rows, columns))
            self.consume(part, row_gradient, plan, group.start)

    def add_weight(self, rows: slice, columns: slice, transposed: Tensor) -> None:
        """DW of these columns: written once if the tile holds all rows, else summed over tiles."""
        assert self.weight is not None
        n, out = self.head.hidden.shape[0], self.weight[columns]
        hidden = self.head.hidden[rows]
        if rows == slice(0, n) and out.dtype == transposed.dtype and self.factor is None:
            if self.adds:
                out.addmm_(transposed, hidden)
            else:
                torch.mm(transposed, hidden, out=out)
            return
        if out.dtype == transposed.dtype and out.dtype.itemsize >= 4:  # the sum itself
            if rows.start or self.adds:
                out.addmm_(transposed, hidden)
            else:
                torch.mm(transposed, hidden, out=out)
            return
        # Blocks of rows come with dW in the dtype of the operands, see `plan`.
        assert not self.adds or self.factor is not None
        if rows.start == 0:
            like, into = self.head.hidden, None
            if accum_dtype(like.dtype) == like.dtype:  # the same memory for all columns
                into = self.head.backend.scratch(like, out.numel()).view(out.shape)
            self.chunk_sum = Sum((out.shape[0], out.shape[1]), like, n, into, self.factor)
        assert self.chunk_sum is not None
        self.chunk_sum.add(slice(None), transposed, hidden)
        if rows.stop == n:
            self.chunk_sum.write(out, add=self.adds)
            self.chunk_sum = None

    def hidden_result(self) -> Tensor | None:
        """The gradient of hidden, once all tiles are added."""
        if self.hidden is None:
            return None
        if self.active is not None:
            self.active.finish(self.head, self.hidden)
        return self.hidden.result(self.hidden_dtype)

    def weight_result(self) -> Tensor | None:
        """The gradient of the weight, once all tiles are added."""
        if self.weight_sum is not None:
            self.weight, self.weight_sum = self.weight_sum.result(), None
        return self.weight

    def bias_result(self) -> Tensor | None:
        """The gradient of the bias, once all tiles are added."""
        if self.bias is not None and self.factor is not None:
            self.bias.mul_(self.factor)
        return self.bias

    def results(self) -> Results:
        return self.hidden_result(), self.weight_result(), self.bias_result()


def in_backward(
    head: Head,
    row_gradient: RowGradient,
    needs: tuple[bool, bool, bool],
    hidden_dtype: torch.dtype,
    plan: Plan,
    kept: Tensor | None = None,
    active: ActiveHidden | None = None,
) -> Results:
    """Gradients of hidden (in `hidden_dtype`), weight and bias; `kept` products are consumed."""
    n = head.hidden.shape[0]
    if kept is not None and len(kept) != n:
        raise RuntimeError(f"kept: expected products of {n} rows, got {len(kept)}")
    if n == 0:
        return _recorded(_nothing(head, needs, hidden_dtype), active)
    formed_from = active if plan.active else None
    whole, factor = (head, row_gradient), None
    if head.rounds_gradients:
        selected = head.selected
        factor = common_factor(row_gradient.coef, *(() if selected is None else selected[1:]))
        row_gradient = row_gradient._replace(coef=row_gradient.coef / factor)
        if selected is not None:
            head = replace(head, selected=selected._replace(values=selected.values / factor))
    if needs[0] and plan.hidden_rows < n:
        hidden = _hidden_by_blocks(head, row_gradient, hidden_dtype, plan, formed_from, factor)
        _finish_adapter(head, factor)
        if not any(needs[1:]):
            return _recorded((hidden, None, None), active)
        needs = (False, needs[1], needs[2])
        head, row_gradient = whole
        _, weight, bias = in_backward(
            head.without_adapter_sums(), row_gradient, needs, hidden_dtype, plan
        )
        return _recorded((hidden, weight, bias), active)
    total = Gradients(
        head,
        needs,
        hidden_dtype,
        plan.tile_columns,
        n if kept is not None else min(plan.tile_rows, n),
        active=formed_from,
        factor=factor,
    )
    if kept is not None:
        total.consume(kept, row_gradient, plan)
    for tile in recomputed_tiles(head, plan, 0 if kept is None else kept.shape[1]):
        total.add(tile, row_gradient)
    _finish_adapter(head, factor)
    return _recorded(total.results(), active)


def _hidden_by_blocks(
    head: Head,
    row_gradient: RowGradient,
    hidden_dtype: torch.dtype,
    plan: Plan,
    active: ActiveHidden | None,
    factor: Tensor | None,
) -> Tensor:
    """The gradient of hidden alone, tokens outermost: its running sum is one block of rows."""
    n, width = head.hidden.shape
    out = torch.empty((n, width), dtype=hidden_dtype, device=head.hidden.device)
    if active is not None:
        active.weigh(head, row_gradient)  # of all rows: only some may have a gradient of mean_logit
    for rows in slices(0, n, plan.hidden_rows):
        total = Gradients(
            head.rows(rows), (True, False, False), hidden_dtype, 0, 0, None, active, factor=factor
        )
        part = row_gradient.rows(rows)
        for tile in recomputed_tiles(total.head, plan, 0):
            total.add(tile, part)
        out[rows] = total.results()[0]  # type: ignore[assignment]  # asked for above
    return out


def in_forward(
    head: Head,
    target: Tensor,
    coefficients: Callable[[Tensor, Tensor], RowGradient],
    needs: tuple[bool, bool, bool],
    hidden_dtype: torch.dtype,
    plan: Plan,
    track: int,
    active: ActiveHidden | None = None,
    factor: Tensor | None = None,
) -> Results:
    """Gradients whose coefficients are known in forward, without recomputing any product.

    One block of tokens at a time against the whole vocabulary: products, statistics, and through
    `coefficients` (the block's final state and argmax → its row gradient) the gradients, which are
    multiplied by `factor`. dW is summed in place; until the first block writes it, it may hold some
    of that block's products.
    """
    n, width = head.hidden.shape
    if n == 0:
        return _recorded(_nothing(head, needs, hidden_dtype), active)
    if exponentials.serves(head, hidden_dtype, plan, track):
        results = exponentials.in_forward(head, target, coefficients, needs, plan)
        return _recorded(results, active)
    d_hidden = head.hidden.new_empty((n, width), dtype=hidden_dtype) if needs[0] else None
    formed_from = active if plan.active else None
    buffer: Tensor | None = None
    total: Gradients | None = None
    row_gradients: list[RowGradient] = []
    for rows in plan.blocks(n):
        part, into = head.rows(rows), None if d_hidden is None else d_hidden[rows]
        size = rows.stop - rows.start
        if total is None:
            total = Gradients(
                part, needs, hidden_dtype, plan.tile_columns, size, into, formed_from,
                plan.sum_columns, factor,
            )  # fmt: skip
        else:
            total.restart(part, into)
        parked = total.weight if rows.start == 0 and plan.first_rows else None
        if buffer is None:
            columns = head.vocabulary if parked is None else plan.first_columns
            buffer = head.buffer(size, columns)
        kept = buffer[:size]
        state = statistics(part, target[rows], track, plan, kept, parked=parked)
        row_gradient = coefficients(*state)._replace(target=target[rows])
        if plan.rest is not None:
            row_gradients.append(row_gradient)
        total.consume(kept, row_gradient, plan)
        if parked is not None:
            total.consume_parked(kept, row_gradient, plan)
            del kept
            buffer = None  # the blocks that follow are of another shape
        formed = total.hidden_result()
        if into is not None and formed is not None and formed is not into:
            into.copy_(formed)
    assert total is not None
    weight = total.weight_result()
    if plan.rest is not None:
        del part, kept, buffer  # a place for other tiles
        _, norms, coefs = zip(*row_gradients, strict=True)
        of_all = RowGradient(target, torch.cat(norms, 1), torch.cat(coefs, 1))
        formed_again = head.without_adapter_sums()
        again = Gradients(formed_again, (False, False, False), hidden_dtype, 0, 0, factor=factor)
        again.weight = weight
        for tile in recomputed_tiles(formed_again, plan.rest, plan.sum_columns):
            again.add(tile, of_all)
    _finish_adapter(head, factor)
    return _recorded((d_hidden, weight, total.bias_result()), active)


def _finish_adapter(head: Head, factor: Tensor | None) -> None:
    if head.adapter is not None:
        head.adapter.multiply_sums(factor)


def _recorded(results: Results, active: ActiveHidden | None) -> Results:
    """`results`, whose active set, if any, goes to `record_active_sets`."""
    if active is not None:
        active.record()
    return results


def _nothing(head: Head, needs: tuple[bool, bool, bool], hidden_dtype: torch.dtype) -> Results:
    """Gradients where every row was dropped."""
    width, zeros = head.hidden.shape[1], head.hidden.new_zeros
    return (
        zeros((0, width), dtype=hidden_dtype) if needs[0] else None,
        head.weight.new_zeros((head.vocabulary, width)) if needs[1] else None,
        zeros(head.vocabulary, dtype=accum_dtype(head.hidden.dtype)) if needs[2] else None,
    )
