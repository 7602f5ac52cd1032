"""Columns of a chunk that are apart from the rest, some in each row: taken out, and put in."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import Chunk, Selected


def take_selected(chunk: Chunk, selected: Selected) -> None:
    """Move the raw products of the selected columns that are in the chunk to `selected.values`.

    In their place is `LogitTransform.lowest_product`, for statistics of the rest.
    """
    row, place, column = _inside(chunk, selected)
    selected.values[row, place] = chunk.x[row, column].to(selected.values.dtype)
    chunk.x[row, column] = chunk.transform.lowest_product


def put_selected(chunk: Chunk, selected: Selected, transposed: Tensor | None = None) -> None:
    """Overwrite the selected columns of a chunk of gradients, in `transposed` (C, N) too."""
    row, place, column = _inside(chunk, selected)
    chunk.x[row, column] = selected.values[row, place].to(chunk.x.dtype)
    if transposed is not None:
        transposed[column, row] = chunk.x[row, column]


def _inside(chunk: Chunk, selected: Selected) -> tuple[Tensor, Tensor, Tensor]:
    """Row, place in the row's ids, and column of the selected ids that are in the chunk."""
    local = selected.ids - chunk.offset
    row, place = ((selected.ids >= 0) & (local >= 0) & (local < chunk.x.shape[1])).nonzero(
        as_tuple=True
    )
    return row, place, local[row, place]
