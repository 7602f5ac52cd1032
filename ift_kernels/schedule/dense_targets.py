"""Cross-entropy of a head against rows of probabilities that come a chunk of columns at a time.

One product in forward and three in backward; every chunk of probabilities is used in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels.backends import contract
from ift_kernels.schedule import accumulate, plan, products
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import Head, Results, Tile

ARRAYS = 6  # of a tile's size in accum_dtype: probabilities, logits and what torch makes of them


class Rows(NamedTuple):
    """What forward finds of every row, float64."""

    cross: Tensor  # (N,) Σ q·(lse − z)
    lse: Tensor  # (N,)
    total: Tensor  # (N,) Σ q
    norm: Tensor  # (2, N): the largest logit, and lse less it


@dataclass(frozen=True)
class DenseTargets:
    """A head, and the function that gives probabilities (N, C) of its rows in accum_dtype."""

    head: Head
    probs: Callable[[slice], Tensor]
    workspace: int  # bytes

    def tiles(self) -> Iterator[Tile]:
        """Tiles of all rows: a chunk of probabilities serves one."""
        (n, width), head = self.head.hidden.shape, self.head
        accum, size = accum_dtype(head.dtype).itemsize, head.dtype.itemsize
        cast = not head.reads_weight
        per_column = n * (size + ARRAYS * accum) + width * head.hidden.element_size() * (1 + cast)
        columns = min(max(self.workspace // per_column, 1), head.vocabulary)
        whole = plan.make(plan.Problem(n, head.vocabulary, width, head.dtype, self.workspace))
        chosen = replace(whole, tile_rows=max(n, 1), tile_columns=columns)
        return products.tiles(head, chosen)

    def values(self) -> Rows:
        """Forward."""
        n, head = len(self.head.hidden), self.head
        state, no_target = contract.new_state(n, head.hidden.device), self._no_target()
        zero = state.values.new_zeros(n)
        expected, total, shift = zero, zero, zero
        for tile in self.tiles():
            products.update(head, tile, no_target, state, 0)
            # Relative to the largest logit: a large one would cost digits.
            top = state.values[contract.MAX]
            top = torch.where(top.isfinite(), top, 0.0)
            expected, shift = expected + total * (shift - top), top
            z, q = self._logits(tile), self.probs(tile.columns)
            z = z.sub_(top.to(z.dtype)[:, None]).masked_fill_(q == 0, 0.0)  # 0 times an infinity
            expected = expected + z.mul_(q).sum(1)
            total = total + q.sum(1)
        norm = torch.stack([state.values[contract.MAX], state.values[contract.SUM].log()])
        cross = total * (norm[1] + (norm[0] - shift)) - expected
        return Rows(cross, norm.sum(0), total, norm)

    def gradients(
        self,
        norm: Tensor,  # (2, N)
        d_cross: Tensor,  # (N,)
        coef: Tensor,  # (4, N)
        needs: tuple[bool, bool, bool],
        dtype: torch.dtype,
    ) -> Results:
        """Those of hidden, in `dtype`, weight and bias: dz = (d_cross·Σq + d_lse)·p − d_cross·q.

        `coef` has the first term: see `Backend.dlogits_`.
        """
        n, head = len(self.head.hidden), self.head
        row_gradient = contract.RowGradient(self._no_target(), norm, coef)
        d_hidden = accumulate.Sum((n, head.hidden.shape[1]), head.hidden, head.vocabulary)
        d_weight = None
        if needs[1]:
            d_weight = head.weight.new_empty(head.weight.shape)
            d_weight = d_weight if n else d_weight.zero_()
        accum = accum_dtype(head.dtype)
        d_bias = head.hidden.new_zeros(head.vocabulary, dtype=accum) if needs[2] else None
        plain_slope = head.transform.scale / head.transform.temperature
        for tile in self.tiles():
            # In 16 bits the terms would be rounded before they cancel.
            columns, product = tile.columns, tile.product.to(accum)
            slope: Tensor | float = plain_slope
            if head.transform.softcap:
                slope = head.transform.derivative(self._logits(tile))
            d_logits = self.probs(columns) * d_cross[:, None].to(accum) * slope
            head.backend.dlogits_(head.chunk(tile)._replace(x=product), row_gradient)
            product.sub_(d_logits)
            gradient = head.rounded(tile.product.copy_(product)) if any(needs[:2]) else product
            if needs[0]:
                d_hidden.add(slice(0, n), gradient, head.weight_chunk(columns))
            if d_weight is not None:
                d_weight[columns] = torch.mm(gradient.T, head.hidden)
            if d_bias is not None:
                accumulate.add_column_sums(d_bias[columns], product)
        return d_hidden.result(dtype) if needs[0] else None, d_weight, d_bias

    def _logits(self, tile: Tile) -> Tensor:
        head = self.head
        product = tile.product.to(accum_dtype(head.dtype))
        return head.transform.apply(product, head.bias_chunk(tile.columns))

    def _no_target(self) -> Tensor:
        hidden = self.head.hidden
        return torch.full((len(hidden),), -1, dtype=torch.int64, device=hidden.device)
