"""Gradients in forward from exponentials that the statistics leave where their products were.

Of a row with target t, and with c about the largest logit so far but for the target's, a tile
becomes E_j = exp(z_j − c), 0 for the target. With the coefficients of `RowGradient`, s the slope
∂z/∂x and lse known at last, the factor of all that a row sends is
f = (c_prob − c_target)·s·exp(c − lse):

    dh = f·(E @ W) + g·W_t,   then E_t = g/f,   dW = Eᵀ @ (f·h),   db = Eᵀ @ f

where g is the target's own gradient; those of an adapter's u and B are of the same form. So dh is
summed while a tile is in cache, as is its product; later tiles of a larger c rescale the sum. dW
alone reads the exponentials again. Against gradients formed in place of the products
(`gradients.in_forward`) one exponential in two and a read and a write of every product are gone; a
factor of each row takes their place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ift_kernels.backends.contract import TARGET, Chunk, RowGradient, new_state
from ift_kernels.schedule.accumulate import add_column_sums
from ift_kernels.schedule.head import Head, Results, slices
from ift_kernels.schedule.plan import Plan

EPILOGUE = "exponentials_"  # of a backend: it goes beyond the contract
TARGET_ELEMENTS = 1 << 20  # of head rows of targets that are gathered at once
# Where E_t can take the target's gradient: beyond, f·h or E_t would leave the range of float32.
SMALLEST_FACTOR, LARGEST_RATIO = 1e-25, 1e18


def serves(head: Head, hidden_dtype: torch.dtype, plan: Plan, track: int) -> bool:
    """Whether gradients of this call can be formed so: of float32, linear in the probabilities."""
    float32 = {head.dtype, head.hidden.dtype, head.weight.dtype, hidden_dtype} == {torch.float32}
    plain = not track and head.selected is None and not head.transform.softcap
    plain = plain and (head.adapter is None or head.adapter.scale is None)
    blocks = not plan.active and not plan.product_rows and not plan.first_rows
    served = head.transform.scale > 0 and hasattr(head.backend, EPILOGUE)
    return float32 and plain and blocks and served


def in_forward(
    head: Head,
    target: Tensor,
    coefficients: Callable[[Tensor, Tensor], RowGradient],
    needs: tuple[bool, bool, bool],
    plan: Plan,
) -> Results:
    """As `gradients.in_forward`."""
    n, width = head.hidden.shape
    new = head.hidden.new_empty
    d_hidden = new((n, width)) if needs[0] else None
    d_weight = new((head.vocabulary, width)) if needs[1] else None
    d_bias = head.hidden.new_zeros(head.vocabulary) if needs[2] else None
    keeps = needs[1] or needs[2] or (head.adapter is not None and head.adapter.d_weight is not None)
    size = min(plan.tile_rows, n)
    buffer = head.buffer(size, head.vocabulary if keeps else plan.tile_columns)
    scaled = head.backend.scratch(head.hidden, size * width).view(size, width) if needs[1] else None
    for rows in plan.blocks(n):
        block = _Block(head.rows(rows), target[rows], buffer[: rows.stop - rows.start], keeps)
        total = None if d_hidden is None else d_hidden[rows]
        block.form(plan.tile_columns, total)
        block.close(coefficients(*block.state))
        if total is not None:
            block.finish_hidden(total)
        if keeps:
            of_rows = None if scaled is None else scaled[: rows.stop - rows.start]
            block.add_weight(d_weight, d_bias, of_rows, rows.start > 0)
    return d_hidden, d_weight, d_bias


class _Block:
    """One block of rows against the whole vocabulary."""

    def __init__(self, head: Head, target: Tensor, buffer: Tensor, keeps: bool) -> None:
        """`buffer`: for all columns, or where they are not kept for those of a tile."""
        self._head, self._target, self._buffer, self._keeps = head, target, buffer, keeps
        self.state = new_state(len(target), target.device)
        self._tiles: list[tuple[slice, Tensor]] = []  # columns and the centre of each tile

    def form(self, tile_columns: int, total: Tensor | None) -> None:
        """Exponentials and statistics of all tiles, and E @ W of the last centre in `total`."""
        head = self._head
        exponentials_: Callable[..., None] = getattr(head.backend, EPILOGUE)
        centre = head.hidden.new_full((len(self._target),), -torch.inf)
        for columns in slices(0, head.vocabulary, tile_columns):
            there = columns if self._keeps else slice(0, columns.stop - columns.start)
            product, before, centre = self._buffer[:, there], centre, centre.clone()
            head.multiply(columns, product)
            chunk = Chunk(product, head.bias_chunk(columns), head.transform, columns.start)
            sums = total if columns.start else None  # there are none before the first tile
            exponentials_(chunk, self._target, self.state, centre, sums)
            self._tiles.append((columns, centre))
            if sums is not None:
                sums.addmm_(product, head.weight_chunk(columns))
            elif total is not None:
                torch.mm(product, head.weight_chunk(columns), out=total)
            if head.adapter is not None and head.adapter.d_hidden is not None:
                of_adapter = head.adapter.d_hidden
                rescale = torch.where(before == centre, 1.0, (before - centre).exp())
                of_adapter.mul_(rescale[:, None])
                of_adapter.addmm_(product, head.adapter.weight_chunk(columns, product.dtype))

    def close(self, row_gradient: RowGradient) -> None:
        """The factors of all tiles, and the target's gradient, from what the rows send."""
        _, norm, coef = (value.double() for value in row_gradient)
        c_target, c_prob = coef[0], coef[1]
        slope = self._head.transform.derivative(norm)
        log_p = (self.state.values[TARGET] - norm[0]) - norm[1]
        self._of_target = (log_p.exp() * c_prob - c_target * log_p.expm1()) * slope
        others = (c_prob - c_target) * slope
        self._factors = row_gradient.coef.new_empty((len(self._tiles), len(self._target)))
        for factor, (_, centre) in zip(self._factors, self._tiles, strict=True):
            factor.copy_(((centre - norm[0]) - norm[1]).exp() * others)

        adapter = self._head.adapter
        if adapter is not None and adapter.d_hidden is not None and adapter.weight is not None:
            self._finish(adapter.d_hidden, adapter.weight)

    def finish_hidden(self, total: Tensor) -> None:
        """Dh, from what `form` left in `total`."""
        self._finish(total, self._head.weight)

    def _finish(self, total: Tensor, weight: Tensor) -> None:
        total.mul_(self._factors[-1][:, None])
        of_target = self._of_target.to(total.dtype)
        step = max(TARGET_ELEMENTS // total.shape[1], 1)
        for part in slices(0, len(total), step):
            rows = weight.index_select(0, self._target[part]).to(total.dtype)
            total[part].addcmul_(rows, of_target[part, None])

    def add_weight(
        self, weight: Tensor | None, bias: Tensor | None, scaled: Tensor | None, adds: bool
    ) -> None:
        """DW and db, or this block's share of them; `scaled`: scratch for f·h.

        And its share of the gradient of an adapter's B.
        """
        (hidden, adapter), before = (self._head.hidden, self._head.adapter), None
        low_rank, d_low_rank = (
            (None, None) if adapter is None else (adapter.hidden, adapter.d_weight)
        )
        apart = self._put_targets()
        for (columns, centre), factor in zip(self._tiles, self._factors, strict=True):
            tile = self._buffer[:, columns]
            if weight is not None and scaled is not None:
                if before is None or not torch.equal(before, centre):
                    torch.mul(hidden, factor[:, None], out=scaled)
                if adds:
                    weight[columns].addmm_(tile.T, scaled)
                else:
                    torch.mm(tile.T, scaled, out=weight[columns])
            if low_rank is not None and d_low_rank is not None:
                d_low_rank[columns].addmm_(tile.T, low_rank * factor[:, None])
            if bias is not None:  # a matrix-vector product would sum the rows one by one
                add_column_sums(bias[columns], tile.mul_(factor[:, None]))
            before = centre
        if len(apart):
            ids, gradient = self._target[apart], self._of_target[apart].to(hidden.dtype)
            if weight is not None and scaled is not None:
                some = torch.index_select(hidden, 0, apart, out=scaled[: len(apart)])
                weight.index_add_(0, ids, some.mul_(gradient[:, None]))
            if low_rank is not None and d_low_rank is not None:
                d_low_rank.index_add_(0, ids, low_rank[apart] * gradient[:, None])
            if bias is not None:
                bias.index_add_(0, ids, gradient)

    def _put_targets(self) -> Tensor:
        """The target's gradient over the factor in E, where its sum is as exact as the others'.

        Returns the rows whose gradient does not fit there.
        """
        of_tile = self._target.div(self._tiles[0][0].stop, rounding_mode="floor")
        factor = self._factors.gather(0, of_tile[None])[0].double()
        ratio = self._of_target / factor
        fits = (factor.abs() > SMALLEST_FACTOR) & (ratio.abs() < LARGEST_RATIO)
        values = ratio.masked_fill(~fits, 0).to(self._buffer.dtype)
        self._buffer.scatter_(1, self._target[:, None], values[:, None])
        return (~fits).nonzero()[:, 0]
