"""Gradients in forward from exponentials that the statistics leave where their products were.

Of a row with target t, and with c about the largest logit so far but for the target's, a tile
becomes E_j = exp(z_j − c), 0 for the target. With the coefficients of `RowGradient`, s the slope
∂z/∂x and lse known at last, the factor of all that a row sends is
f = (c_prob − c_target)·s·exp(c − lse):

    dh = f·(E @ W) + g·W_t,   dW = Eᵀ @ (f·h), and g·h for the row of t

where g is the target's own gradient. So dh is summed while a tile is in cache, as is its product;
later tiles of a larger c rescale the sum. dW alone reads the exponentials again. Against gradients
formed in place of the products (`gradients.in_forward`) one exponential in two and a read and a
write of every product are gone; a factor of each row takes their place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ift_kernels.backends.contract import TARGET, Chunk, RowGradient, new_state
from ift_kernels.schedule.head import Head, Results, slices
from ift_kernels.schedule.plan import Plan

EPILOGUE = "exponentials_"  # of a backend: it goes beyond the contract
TARGET_ELEMENTS = 1 << 20  # of head rows of targets that are gathered at once


def serves(head: Head, hidden_dtype: torch.dtype, plan: Plan, track: int) -> bool:
    """Whether gradients of this call can be formed so: of float32, linear in the probabilities."""
    float32 = {head.dtype, head.hidden.dtype, head.weight.dtype, hidden_dtype} == {torch.float32}
    plain = not track and head.selected is None and not head.transform.softcap
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
    keeps = needs[1] or needs[2]
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
            product, centre = self._buffer[:, there], centre.clone()
            head.multiply(columns, product)
            chunk = Chunk(product, head.bias_chunk(columns), head.transform, columns.start)
            sums = total if columns.start else None  # there are none before the first tile
            exponentials_(chunk, self._target, self.state, centre, sums)
            self._tiles.append((columns, centre))
            if sums is not None:
                sums.addmm_(product, head.weight_chunk(columns))
            elif total is not None:
                torch.mm(product, head.weight_chunk(columns), out=total)

    def close(self, row_gradient: RowGradient) -> None:
        """The factors of all tiles, and the target's gradient, from what the rows send."""
        _, norm, coef = (value.double() for value in row_gradient)
        c_target, c_prob = coef[0], coef[1]
        slope = self._head.transform.derivative(norm)
        log_p = (self.state.values[TARGET] - norm[0]) - norm[1]
        of_target = (log_p.exp() * c_prob - c_target * log_p.expm1()) * slope
        self._of_target = of_target.to(coef_dtype := row_gradient.coef.dtype)
        others = (c_prob - c_target) * slope
        self._factors = [
            (((centre - norm[0]) - norm[1]).exp() * others).to(coef_dtype)
            for _, centre in self._tiles
        ]

    def finish_hidden(self, total: Tensor) -> None:
        """Dh, from what `form` left in `total`."""
        total.mul_(self._factors[-1][:, None])
        step = max(TARGET_ELEMENTS // total.shape[1], 1)
        for part in slices(0, len(total), step):
            rows = self._head.weight.index_select(0, self._target[part])
            total[part].addcmul_(rows, self._of_target[part, None])

    def add_weight(
        self, weight: Tensor | None, bias: Tensor | None, scaled: Tensor | None, adds: bool
    ) -> None:
        """DW and db, or this block's share of them; `scaled`: scratch for f·h."""
        hidden, before = self._head.hidden, None
        for (columns, centre), factor in zip(self._tiles, self._factors, strict=True):
            transposed = self._buffer[:, columns].T
            if weight is not None and scaled is not None:
                if before is None or not torch.equal(before, centre):
                    torch.mul(hidden, factor[:, None], out=scaled)
                if adds:
                    weight[columns].addmm_(transposed, scaled)
                else:
                    torch.mm(transposed, scaled, out=weight[columns])
            if bias is not None:
                bias[columns].addmv_(transposed, factor)
            before = centre
        if weight is not None and scaled is not None:
            torch.mul(hidden, self._of_target[:, None], out=scaled)
            weight.index_add_(0, self._target, scaled)
        if bias is not None:
            bias.index_add_(0, self._target, self._of_target)
