"""A head's operands and a tile of its products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ift_kernels.backends.contract import Backend, Chunk
from ift_kernels.common.transform import LogitTransform

Results = tuple[Tensor | None, Tensor | None, Tensor | None]  # gradients of hidden, weight, bias


@dataclass(frozen=True)
class Head:
    """What every schedule needs to form products: rows `hidden` (N, D) against `weight` (V, D)."""

    backend: Backend
    hidden: Tensor  # (N, D), compute dtype
    weight: Tensor  # (V, D), any float dtype, cast chunk by chunk
    bias: Tensor | None  # (V,), float32 (float64 when computing in float64)
    transform: LogitTransform
    # The last chunk that was cast: one cast serves a tile's products and its gradient.
    _cast: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def weight_chunk(self, columns: slice) -> Tensor:
        if self.weight.dtype == self.hidden.dtype:
            return self.weight[columns]
        key = columns.start, columns.stop
        if key not in self._cast:
            self._cast.clear()  # before the next takes its memory
            self._cast[key] = self.weight[columns].to(self.hidden.dtype)
        return self._cast[key]

    def bias_chunk(self, columns: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[columns]

    def chunk(self, tile: Tile) -> Chunk:
        """What a backend's epilogues take."""
        columns = tile.columns
        return Chunk(tile.product, self.bias_chunk(columns), self.transform, columns.start)

    def rows(self, rows: slice) -> Head:
        return replace(self, hidden=self.hidden[rows])


class Tile(NamedTuple):
    """A product and its rows and columns. The next one overwrites it, unless it is kept."""

    rows: slice
    columns: slice
    product: Tensor


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
