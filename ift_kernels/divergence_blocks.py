"""The schedule of `linear_divergence`, and its formulas on a chunk.

Blocks of tokens, and inside a block chunks of the vocabulary. As many tokens make a block as the
workspace holds whole rows of both heads' products for, which are then formed once; where not even
`MIN_BLOCK` rows fit, the products of a chunk are formed anew for each of the three looks at them:

1. both log-sum-exps;  2. the divergence, a sum of terms of known log-probabilities;
3. the gradient, which needs that sum.

With s, t the log-probabilities of student and teacher, p = eˢ, q = eᵗ and m = (1 − β)p + βq::

    forward  Σ q(t − s)                                dz = p − q
    reverse  Σ p(s − t)                                dz = p·((s − t) − Σ p(s − t))
    jsd      Σ (1 − β)p(s − log m) + βq(t − log m)     dz = (1 − β)p·((s − log m) − Σ p(s − log m))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ift_kernels import engine, plan
from ift_kernels.backends import reference as ref

KINDS = ("forward", "reverse", "jsd")
MIN_BLOCK = 64  # rows; fewer make thin products, slower than forming them three times


@dataclass(frozen=True)
class Divergence:
    """The formulas of a kind on log-probabilities of one chunk."""

    kind: str
    beta: float

    def _mixture(self, s: Tensor, t: Tensor) -> Tensor:
        return torch.logaddexp(s + math.log1p(-self.beta), t + math.log(self.beta))

    def terms(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the chunk: of the divergence, and of what its gradient is centred by."""
        if self.kind != "jsd":
            first, second = (t, s) if self.kind == "forward" else (s, t)
            value = _times(first.exp(), first - second).sum(1, dtype=torch.float64)
            return value, value
        m = self._mixture(s, t)
        own = _times(s.exp(), s - m).sum(1, dtype=torch.float64)
        other = _times(t.exp(), t - m).sum(1, dtype=torch.float64)
        return (1 - self.beta) * own + self.beta * other, own

    def gradient(self, s: Tensor, t: Tensor, centre: Tensor) -> Tensor:
        """∂/∂z of the divergence of each row."""
        p = s.exp()
        if self.kind == "forward":
            return p - t.exp()
        if self.kind == "reverse":
            return _times(p, s - t - centre[:, None])
        share = (1 - self.beta) * p
        return _times(share, s - self._mixture(s, t) - centre[:, None])


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p·x with 0 where p is 0, whatever x: both heads may rule out a token with −∞."""
    return torch.where(p == 0, 0.0, p * x)


class Blocks:
    """Both heads over blocks of the rows that count, and the tiles of a block."""

    def __init__(
        self,
        heads: tuple[engine.Head, engine.Head],
        workspace: int,
        formula: Divergence,
        need_hidden: bool,
    ) -> None:
        self.heads, self.formula = heads, formula
        rows, vocabulary = heads[0].hidden.shape[0], heads[0].vocabulary
        per_row = sum(head.hidden.element_size() for head in heads) * vocabulary
        # Beside the products: some eight float32 matrices of a tile's size, and the sum of dh.
        extra = 8 * heads[0].hidden.shape[1] if need_hidden else 0
        tile_bytes = min(plan.TILE_BYTES, workspace // 4)
        fit = (workspace - tile_bytes) // (per_row + extra)
        self.keep = fit >= min(rows, MIN_BLOCK)
        if self.keep:
            blocks = max(1, -(-rows // max(fit, 1)))
            self.rows = max(1, -(-rows // blocks))
        else:
            self.rows = max(1, min(rows, workspace // 4 // (extra + 64)))
        per_column = 40 * self.rows  # bytes: products and temporaries of one column
        weights = sum(
            (h.weight.dtype != h.hidden.dtype) * h.hidden.shape[1] * h.hidden.element_size()
            for h in heads
        )
        columns = tile_bytes // (per_column + weights)
        self.columns = min(vocabulary, max(16, columns))
        if not self.keep and columns < 16:
            self.rows = max(1, min(self.rows, (tile_bytes // 16 - weights) // 40))
        width = vocabulary if self.keep else self.columns
        self.buffers = [
            engine.new_rows(h.backend, h.hidden, min(self.rows, rows), width) for h in heads
        ]

    def blocks(self) -> Iterator[slice]:
        return engine.slices(0, self.heads[0].hidden.shape[0], self.rows)

    def tiles(self, rows: slice, again: bool) -> Iterator[tuple[slice, list[Tensor]]]:
        """Columns and the two products of each tile; kept ones are there `again`."""
        count = rows.stop - rows.start
        for columns in engine.slices(0, self.heads[0].vocabulary, self.columns):
            place = columns if self.keep else slice(0, columns.stop - columns.start)
            products = [buffer[:count, place] for buffer in self.buffers]
            if not (again and self.keep):
                for head, product in zip(self.heads, products, strict=True):
                    torch.mm(head.hidden[rows], head.weight_chunk(columns).T, out=product)
            yield columns, products

    def by_columns(self) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """All tiles, the vocabulary outermost, formed anew."""
        n = self.heads[0].hidden.shape[0]
        for columns in engine.slices(0, self.heads[0].vocabulary, self.columns):
            width = columns.stop - columns.start
            for rows in engine.slices(0, n, self.rows):
                products = [buffer[: rows.stop - rows.start, :width] for buffer in self.buffers]
                for head, product in zip(self.heads, products, strict=True):
                    torch.mm(head.hidden[rows], head.weight_chunk(columns).T, out=product)
                yield columns, rows, products

    def log_probs(self, columns: slice, products: list[Tensor], norm: Tensor) -> list[Tensor]:
        """Log-probabilities of a tile, float32 at least; norm (2, 2, rows) of both heads."""
        found = []
        for head, product, (top, log_sum) in zip(self.heads, products, norm, strict=True):
            z = self.logits(head, columns, product)
            found.append((z - top[:, None]).sub_(log_sum[:, None]))
        return found

    def logits(self, head: engine.Head, columns: slice, product: Tensor) -> Tensor:
        return head.transform.apply(
            product.to(engine.wide(product.dtype)), head.bias_chunk(columns)
        )

    def norm(self, rows: slice) -> Tensor:
        """Maximum and log of the sum of exponentials, (2 heads, 2, rows)."""
        states = [h.backend.new_state(rows.stop - rows.start, h.hidden.device) for h in self.heads]
        nobody = torch.full((rows.stop - rows.start,), -1, device=states[0][0].device)
        for columns, products in self.tiles(rows, again=False):
            for head, product, state in zip(self.heads, products, states, strict=True):
                head.backend.stats_update(
                    product, head.bias_chunk(columns), head.transform, nobody, columns.start,
                    *state, 0,
                )  # fmt: skip
        dtype = engine.wide(self.heads[0].hidden.dtype)
        both = [torch.stack([state[ref.MAX], state[ref.SUM].log()]) for state, _ in states]
        return torch.stack(both).to(dtype)

    def values(self, rows: slice, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence and centre of the rows of a block, float64."""
        total: list[Tensor] = []
        for columns, products in self.tiles(rows, again=True):
            terms = self.formula.terms(*self.log_probs(columns, products, norm))
            total = [a + b for a, b in zip(total, terms, strict=True)] if total else list(terms)
        return total[0], total[1]


class Sums:
    """Gradients of hidden, weight and bias."""

    def __init__(self, blocks: Blocks, needs: list[bool], hidden_dtype: torch.dtype) -> None:
        head = blocks.heads[0]
        self.blocks, self.head, self.needs = blocks, head, needs
        self.wide = engine.wide(head.hidden.dtype)
        n, device = head.hidden.shape[0], head.hidden.device
        self.hidden = self.weight = self.bias = None
        if needs[0]:
            self.hidden = torch.zeros((n, head.weight.shape[1]), dtype=hidden_dtype, device=device)
        if needs[1]:
            self.weight = torch.zeros(head.weight.shape, dtype=head.weight.dtype, device=device)
        if needs[2]:
            self.bias = torch.zeros(head.vocabulary, dtype=self.wide, device=device)
        # Sums over blocks go straight into dW; in 16 bits only one block may.
        self.direct = blocks.rows >= n or head.weight.dtype.itemsize >= 4

    def _dz(
        self, columns: slice, products: list[Tensor], norm: Tensor, centre: Tensor, upstream: Tensor
    ) -> Tensor:
        """The gradient of a tile's products, which it also replaces the student's by."""
        s, t = self.blocks.log_probs(columns, products, norm)
        upstream = upstream.to(self.wide)[:, None]
        dz = self.blocks.formula.gradient(s, t, centre.to(self.wide)).mul_(upstream)
        z = self.blocks.logits(self.head, columns, products[0])
        dz = dz.mul_(self.head.transform.derivative(z))
        dz = torch.where(upstream == 0, 0.0, dz)  # such a row teaches nothing, NaN or not
        products[0].copy_(dz)
        return dz

    def add(self, rows: slice, norm: Tensor, centre: Tensor, upstream: Tensor, again: bool) -> None:
        """Add a block's part; `again`: its products may still be there from the last look."""
        if not (self.needs[0] or self.needs[2] or (self.needs[1] and self.direct)):
            return
        part: Tensor | None = None
        for columns, products in self.blocks.tiles(rows, again=again):
            dz = self._dz(columns, products, norm, centre, upstream)
            if self.hidden is not None:
                along = torch.mm(products[0], self.head.weight_chunk(columns)).to(self.wide)
                part = along if part is None else part.add_(along)
            if self.weight is not None and self.direct:
                here, chunk = self.weight[columns], products[0].T
                if here.dtype == chunk.dtype:
                    here.addmm_(chunk, self.head.hidden[rows])
                else:
                    here.add_(torch.mm(chunk, self.head.hidden[rows]))
            if self.bias is not None:
                self.bias[columns] += dz.sum(0)
        if self.hidden is not None and part is not None:
            self.hidden[rows] = part.to(self.hidden.dtype)

    def finish(self, norm: Tensor, centre: Tensor, upstream: Tensor) -> engine.Results:
        """The gradients; a dW in 16 bits, of several blocks, is formed here, chunk by chunk."""
        if self.weight is not None and not self.direct:
            total: Tensor | None = None
            for columns, rows, products in self.blocks.by_columns():
                self._dz(columns, products, norm[..., rows], centre[rows], upstream[rows])
                part = torch.mm(products[0].T, self.head.hidden[rows])
                total = part.to(self.wide) if total is None else total.add_(part)
                if rows.stop >= self.head.hidden.shape[0]:
                    self.weight[columns] = total.to(self.weight.dtype)
                    total = None
        return self.hidden, self.weight, self.bias
