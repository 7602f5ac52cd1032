"""Products of the head, tile by tile, and the statistics made of them.

A *product* is a raw ``h @ W[chunk].T``, made by the vendor's GEMM; a backend reads it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ift_kernels.backends.contract import TRACK_ALL, Chunk, RowState, Selected, new_state
from ift_kernels.common.transform import LogitTransform
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import Head, Tile, slices
from ift_kernels.schedule.plan import Plan

MASKED_ELEMENTS = 1 << 16  # whose logits are formed at once


def tiles(
    head: Head, plan: Plan, kept: Tensor | None = None, parked: Tensor | None = None
) -> Iterator[Tile]:
    """All tiles, the vocabulary outermost; the first columns are written to `kept` (N, K).

    The others stay in `parked`, if that is given: see `parked_tile`.
    """
    n = head.hidden.shape[0]
    first = 0 if kept is None else kept.shape[1]
    if kept is not None:
        for columns in slices(0, first, plan.tile_columns):
            for rows in plan.product_slices(n):
                product = kept[rows, columns]
                head.multiply(columns, product, rows)
                yield Tile(rows, columns, product)
    if parked is None:
        yield from recomputed_tiles(head, plan, first)
        return
    for columns in slices(first, head.vocabulary, plan.tile_columns):
        product = parked_tile(parked, n, columns)
        head.multiply(columns, product)
        yield Tile(slice(0, n), columns, product)


def parked_tile(d_weight: Tensor, rows: int, columns: slice) -> Tensor:
    """(rows, columns) of products in the memory of dW (V, D), in the rows of dW of these columns.

    So dW of other columns can be written while they wait. They fit, since there are at most D rows.
    """
    width = columns.stop - columns.start
    return d_weight[columns].view(-1)[: rows * width].view(rows, width)


def recomputed_tiles(head: Head, plan: Plan, first: int) -> Iterator[Tile]:
    """Tiles from column `first` on, in one scratch buffer."""
    if first == head.vocabulary:
        return
    n = head.hidden.shape[0]
    scratch = head.buffer(min(plan.tile_rows, n), plan.tile_columns)
    for columns in slices(first, head.vocabulary, plan.tile_columns):
        width = columns.stop - columns.start
        scratch[:, width:] = 0  # as in empty_padded, for a narrower last tile
        for rows in slices(0, n, plan.tile_rows):
            product = scratch[: rows.stop - rows.start, :width]
            head.multiply(columns, product, rows)
            yield Tile(rows, columns, product)


def update(head: Head, tile: Tile, target: Tensor, state: RowState, track: int) -> None:
    """Update the running statistics with a tile."""
    rows = tile.rows
    if head.selected is not None:
        selected = head.selected.rows(rows)
        head.backend.take_selected(head.chunk(tile), selected)
        if head.masks_selected:
            _update_masked(head, tile, selected, target, state, track)
            return
    head.backend.stats_update(head.chunk(tile), target[rows], state.rows(rows), track)


def _update_masked(
    head: Head, tile: Tile, selected: Selected, target: Tensor, state: RowState, track: int
) -> None:
    """The same from logits, with -inf for selected columns, which no product gives."""
    chunk, (n, width) = head.chunk(tile), tile.product.shape
    for part in slices(0, n, max(MASKED_ELEMENTS // width, 1)):
        x = chunk.x[part].to(accum_dtype(chunk.x.dtype))
        local = selected.ids[part] - chunk.offset
        outside = (selected.ids[part] < 0) | (local < 0) | (local >= width)
        mask = torch.zeros((len(x), width + 1), dtype=torch.bool, device=x.device)
        mask.scatter_(1, local.masked_fill(outside, width), True)
        z = chunk.transform.apply(x, chunk.bias).masked_fill(mask[:, :width], -torch.inf)
        rows = slice(tile.rows.start + part.start, tile.rows.start + part.stop)
        of_logits = Chunk(z, None, LogitTransform(), chunk.offset)
        head.backend.stats_update(of_logits, target[rows], state.rows(rows), track)


def statistics(
    head: Head,
    target: Tensor,
    track: int,
    plan: Plan,
    kept: Tensor | None = None,
    last: bool = False,
    parked: Tensor | None = None,
) -> RowState:
    """The running state after the whole vocabulary; `kept` and `parked` as of `tiles`.

    `last`: no backward recomputes these products, so the fused kernel, which rounds otherwise, may
    serve.
    """
    state = new_state(head.hidden.shape[0], head.hidden.device)
    track &= TRACK_ALL
    # One kernel for products and statistics, where a backend has it and its table prefers it.
    fused: Callable[..., bool] | None = getattr(head.backend, "fused_statistics", None)
    rounds = head.dtype != head.hidden.dtype or plan.product_rows  # otherwise than such a kernel
    plain = head.selected is None and head.adapter is None and head.reads_weight
    if last and kept is None and fused is not None and not rounds and plain:
        operands = head.hidden, head.weight, head.bias, head.transform
        if fused(*operands, target, state, track):
            return state
    for tile in tiles(head, plan, kept, parked):
        update(head, tile, target, state, track)
    return state
