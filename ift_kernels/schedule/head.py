"""A head's operands and a tile of its products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ift_kernels.backends.contract import Backend, Chunk, Selected
from ift_kernels.common.head_rows import HeadRows, is_dense, read_rows
from ift_kernels.common.transform import LogitTransform

if TYPE_CHECKING:
    from ift_kernels.schedule.adapter import Adapter

Results = tuple[Tensor | None, Tensor | None, Tensor | None]  # gradients of hidden, weight, bias


@dataclass(frozen=True)
class Head:
    """What every schedule needs to form products: rows `hidden` (N, D) against `weight` (V, D)."""

    backend: Backend
    hidden: Tensor  # (N, D), in the dtype of the operands of products
    weight: Tensor  # (V, D), any float dtype, or `HeadRows`; cast or computed chunk by chunk
    bias: Tensor | None  # (V,), float32 (float64 when computing in float64)
    transform: LogitTransform
    # Of products: that of their operands, or float32 where the vendor does not round 16-bit ones.
    product_dtype: torch.dtype | None = None
    # Columns that each row has apart: statistics leave them out, gradients take their values.
    selected: Selected | None = None
    # What is added to products of `weight`, and a scale of their columns.
    adapter: Adapter | None = None
    # The last chunk that was cast: one cast serves a tile's products and its gradient.
    _cast: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return self.product_dtype or self.hidden.dtype

    @property
    def reads_weight(self) -> bool:
        """Whether products take rows of the weight where they are, without a cast."""
        return is_dense(self.weight, self.hidden.dtype)

    @property
    def rounds_gradients(self) -> bool:
        """Whether a tile's gradient is rounded for products: to 16 bits, of float32 logits."""
        return self.dtype != self.hidden.dtype

    @property
    def masks_selected(self) -> bool:
        """Whether the selected columns are masked in the logits, see `products.update`.

        A bounded transform counts what is left in their place. That may be more than the rest, of a
        set of most columns; and under a negative scale it is an infinity, which beside a bias of
        -inf would be a NaN.
        """
        if self.selected is None or not self.transform.bounded:
            return False
        most = 2 * self.selected.ids.shape[1] > self.vocabulary
        return most or (self.bias is not None and self.transform.scale < 0)

    def buffer(self, rows: int, columns: int) -> Tensor:
        """Where products are written, see `empty_padded`."""
        like = self.hidden
        if self.dtype != like.dtype:
            like = like.new_empty(0, dtype=self.dtype)
        return empty_padded(self.backend, like, rows, columns)

    def weight_chunk(self, columns: slice) -> Tensor:
        if self.reads_weight:
            return self.weight[columns]
        key = columns.start, columns.stop
        if key not in self._cast:
            self._cast.clear()  # before the next takes its memory
            shape = columns.stop - columns.start, self.weight.shape[1]
            cast: Tensor = self.backend.scratch(self.hidden, shape[0] * shape[1]).view(shape)
            self._cast[key] = read_rows(self.weight, columns, cast)
        return self._cast[key]

    def weight_rows(self, columns: slice) -> Tensor:
        """The same, not cast: of computed rows the chunk that products take."""
        if isinstance(self.weight, HeadRows):
            return self.weight_chunk(columns)
        return self.weight[columns]

    def multiply(self, columns: slice, out: Tensor, rows: slice = slice(None)) -> None:
        """Write the products of these rows and columns to `out`."""
        multiply(self.hidden[rows], self.weight_chunk(columns).T, out)
        if self.adapter is not None:
            self.adapter.apply(columns, out, rows)

    def bias_chunk(self, columns: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[columns]

    def chunk(self, tile: Tile) -> Chunk:
        """What a backend's epilogues take."""
        columns = tile.columns
        return Chunk(tile.product, self.bias_chunk(columns), self.transform, columns.start)

    def rounded(self, gradient: Tensor) -> Tensor:
        """A tile's gradient as an operand of products: itself, or in 16 bits, of its own memory."""
        if not self.rounds_gradients:
            return gradient
        return empty_padded(self.backend, self.hidden, *gradient.shape).copy_(gradient)

    def rows(self, rows: slice) -> Head:
        selected = None if self.selected is None else self.selected.rows(rows)
        adapter = None if self.adapter is None else self.adapter.rows(rows)
        return replace(self, hidden=self.hidden[rows], selected=selected, adapter=adapter)

    def without_adapter_sums(self) -> Head:
        """For tiles that are formed again, see `Adapter`."""
        if self.adapter is None:
            return self
        return replace(self, adapter=self.adapter.without_sums())


class Tile(NamedTuple):
    """A product and its rows and columns. The next one overwrites it, unless it is kept."""

    rows: slice
    columns: slice
    product: Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b``, rounded to the dtype of `out` alone: theirs, or float32 of 16 bits."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        fp32_product(a, b, out)
    return out


def fp32_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` of 16-bit matrices, rounded to float32 alone."""
    torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def empty_padded(backend: Backend, like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised (rows, columns) for products, each row on a cache line, zeros between the rows.

    The zeros matter: oneDNN's 16-bit products read the rows of their first operand up to the next
    multiple of 64 bytes and multiply what is beyond by 0, so that a NaN there would reach the wrong
    row.
    """
    line = 64 // like.element_size()
    width = -(-columns // line) * line
    buffer: Tensor = backend.scratch(like, rows * width).view(rows, width)
    buffer[:, columns:] = 0
    return buffer[:, :columns]


def pad_row_stride(matrix: Tensor) -> Tensor:
    """`matrix` as the first operand of products, its rows of consecutive elements.

    Copied if they are not, which some kernels need, or where a NaN could leak, see empty_padded.
    """
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    whole_lines = matrix.shape[1] * matrix.element_size() % 64 == 0
    if whole_lines or matrix.element_size() != 2 or matrix.device.type != "cpu":
        return matrix
    line = 32  # elements of 16 bits
    width = -(-matrix.shape[1] // line) * line
    padded = matrix.new_zeros((matrix.shape[0], width))[:, : matrix.shape[1]]
    return padded.copy_(matrix)


def pad_rows(matrix: Tensor, rows: int) -> Tensor:
    """`matrix` with zeros below, so that it has so many rows."""
    if len(matrix) == rows:
        return matrix
    padded = matrix.new_zeros((rows, matrix.shape[1]))
    padded[: len(matrix)] = matrix
    return padded


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover [start, stop)."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))
