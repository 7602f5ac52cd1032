"""The active-set backward: gradients from the columns that matter, the rest as a tail.

In a trained model a block of tokens gives real probability to a few percent of the vocabulary.
Forward, tile by tile while the products are in cache, marks the columns to which any row of a block
gives more than a threshold, keeps their products, and for the rest, the tail, keeps sums per row
and *tail tile* of the vocabulary. With u[r, t] the mean gradient of row r over the tail of tile t,

    dz[r, v] ≈ u[r, tile of v] + 1[v active in r's block]·(dz[r, v] − u[r, tile of v])

a piecewise constant part, whose products with W and h cost V / tail tile times less, and a sparse
part on the active columns only. Every row keeps its exact sum over every tile.

Floors per tile of N × C products, k the active share: (2 + 4k)·N·C·D flops with both gradients,
(2 + 2k) for dh alone, against 6 and 4 dense; bytes beyond the dense forward: one more read of the
tile, 2·k·N·C elements stored and read, k·N·C·D / block elements of W gathered. docs/active_set.md
derives the error bound and has what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels import engine
from ift_kernels.active_set import ActiveSet
from ift_kernels.backends import reference as ref
from ift_kernels.engine import Head, Tile, slices
from ift_kernels.plan import TILE_BYTES, Problem
from ift_kernels.sums import wide_dtype

SPARSE, DENSE, AGAIN = range(3)  # how a tile was left: active columns, all products, nothing
# Above this share of active columns two dense products cost no more than gathering the columns.
DENSE_SHARE = 0.8
PARTS = 1 << 23  # of Tiling.parts, at most: they should stay in cache
REFERENCE, MASS, MASS_Z, SLOPES = range(4)  # rows of `tails`


@dataclass(frozen=True)
class Tiling:
    """Tiles of products: whole blocks and whole tail tiles."""

    rows: int
    columns: int
    block: int  # that of the options, or all rows where they are fewer
    options: ActiveSet
    capacity: int  # bytes that may be kept
    parts: int  # elements of products for dW that may wait to be summed

    @property
    def tail(self) -> int:
        return self.options.tail_tile

    def tails(self, columns: slice) -> slice:
        """The tail tiles in these columns."""
        return slice(columns.start // self.tail, -(-columns.stop // self.tail))

    def blocks(self, rows: slice) -> slice:
        """The blocks in these rows."""
        return slice(rows.start // self.block, -(-rows.stop // self.block))


def tiling(problem: Problem, options: ActiveSet, held_elsewhere: int = 0) -> Tiling | None:
    """The largest tiles whose work leaves half of the workspace to what is kept, else the smallest.

    None where not even those fit: the call is then served by the exact schedules.
    """
    p, n, itemsize = problem, max(problem.rows, 1), problem.dtype.itemsize
    block = min(options.block, -(-n // 32) * 32)
    tails, blocks = -(-p.vocabulary // options.tail_tile), -(-n // block)
    fixed = tails * p.width * 4 + (blocks + 4) * p.vocabulary + 6 * tails * n * 4
    if p.need_hidden:
        fixed += n * p.width * (4 + (itemsize if itemsize < 4 else 0))
    parts = min(PARTS, p.workspace // 16 // itemsize)
    if p.need_weight:
        fixed += parts * itemsize + (n * p.width * 4 if itemsize < 4 else 0)
    best = None
    for bytes_of_tile in (TILE_BYTES >> shift for shift in range(8)):
        fit = bytes_of_tile // (n * itemsize) // options.tail_tile
        columns = min(max(fit, 1) * options.tail_tile, p.vocabulary)
        rows = max(bytes_of_tile // (columns * itemsize) // block, 1) * block
        rows = min(rows, n)
        tile = -(-rows // block) * block * columns * itemsize
        # A product formed again, its stored columns, their copy, its transpose for dW.
        copies = 3 + (p.transpose and p.need_weight)
        # Head rows gathered and cast, and sums of dW over tiles of rows or in another dtype.
        summed = p.need_weight and (rows < n or not p.same_dtype)
        per_column = itemsize * (1 + (not p.same_dtype)) + (4 + itemsize) * summed
        pairs = 48 * tile // itemsize // block  # of the columns that backward takes together
        work = fixed + copies * tile + pairs + columns * p.width * per_column
        if work > p.workspace:
            continue
        best = Tiling(
            rows, columns, block, options, max(0, p.workspace - held_elsewhere - work), parts
        )
        if 2 * work <= p.workspace:
            break
    return best


class Formed(NamedTuple):
    """What forward leaves for backward.

    The rows of `layout`, int64 (1 + tiles, 3) on the CPU: first rows, columns and block of the
    tiling, then how each tile is left (SPARSE, DENSE or AGAIN), where in `store`, and 0. Backward
    takes the tiling from there, not from a second plan that could come out otherwise.
    """

    marks: Tensor  # uint8 (blocks, V)
    tails: Tensor  # (4, tail tiles, N), see REFERENCE … SLOPES
    layout: Tensor
    store: Tensor  # flat, in the dtype of the products


def tiles(head: Head, at: Tiling) -> list[tuple[slice, slice]]:
    """(rows, columns) of every tile, the vocabulary outermost."""
    n = head.hidden.shape[0]
    return [
        (rows, columns)
        for columns in slices(0, head.vocabulary, at.columns)
        for rows in slices(0, n, at.rows)
    ]


def products(head: Head, at: Tiling, order: list[tuple[slice, slice]]) -> Iterator[Tile]:
    """The products of these tiles, in one scratch buffer."""
    scratch = None
    for rows, columns in order:
        size = rows.stop - rows.start, columns.stop - columns.start
        if scratch is None or size[1] > scratch.shape[1]:
            scratch = engine.new_rows(head.backend, head.hidden, at.rows, size[1])
        scratch[:, size[1] :] = 0  # as in engine.new_rows
        product = scratch[: size[0], : size[1]]
        weight = head.weight_chunk(columns)
        yield Tile(rows, columns, torch.mm(head.hidden[rows], weight.T, out=product))


def whole_lines(elements: int) -> int:
    """Rounded up, so that what comes next in the store starts on a cache line.

    The active columns of a tile are whole lines as they are, blocks being multiples of 32, so that
    those of the next tile follow at once: `active_backward` takes them together then.
    """
    return -(-elements // 32) * 32


def whole_elements(like: Tensor, rows: int, columns: int) -> int:
    """Elements that a tile takes in the store when it is kept whole: rows on cache lines."""
    line = 64 // like.element_size()
    return rows * (-(-columns // line) * line)


class Rooms:
    """Work memory, the same every time: what is freed and taken again costs page faults."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}

    def take(self, name: str, head: Head, elements: int) -> Tensor:
        """Uninitialised, in the dtype of the products, until `name` is taken again."""
        room = self._rooms.get(name)
        if room is None or room.numel() < elements:
            self._rooms.pop(name, None)  # before the larger one is taken
            room = self._rooms[name] = head.backend.scratch(head.hidden, elements)
        return room[:elements]

    def head_rows(self, head: Head, weight: Tensor, ids: Tensor, width: int) -> Tensor:
        """(width, D): rows `ids` of `weight`, the last one again for what is missing.

        Against columns of zeros, as that row is active anyway: what it holds is in the sum already.
        """
        if width > len(ids):
            ids = torch.cat([ids, ids[-1:].expand(width - len(ids))])
        out = self.take("head", head, width * weight.shape[1]).view(width, -1)
        return torch.index_select(weight, 0, ids, out=out)


def marks_of(
    head: Head, tile: Tile, target: Tensor, log_sum_exp: Tensor, threshold: float, block: int
) -> Tensor:
    """Which columns of products are active in which block, uint8 (blocks, C)."""
    level = log_sum_exp + (math.log(threshold) if threshold else -math.inf)
    marks: Tensor = head.backend.active_marks(
        tile.product, head.bias_chunk(tile.columns), head.transform, target[tile.rows],
        tile.columns.start, level, block,
    )  # fmt: skip
    return marks


def mark(
    head: Head, at: Tiling, tile: Tile, target: Tensor, top: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """Marks of a tile against the log-sum-exp ``top + log_sum``, and the reference of its sums."""
    marks = marks_of(head, tile, target, top + log_sum, at.options.threshold, at.block)
    # A row of −inf only has no finite reference point; with 0 its sums are 0.
    return torch.where(top == -torch.inf, 0.0, top), marks


def collect(
    head: Head, at: Tiling, tile: Tile, marks: Tensor, store: Tensor, tails: Tensor
) -> None:
    """Fill `store` (marked, block) and `tails` (4, its tail tiles, its rows) but REFERENCE."""
    head.backend.active_collect(
        tile.product, head.bias_chunk(tile.columns), head.transform, marks, tails[REFERENCE, 0],
        at.tail, store, tails[MASS:],
    )  # fmt: skip


def form(head: Head, target: Tensor, track: int, at: Tiling) -> tuple[Tensor, Tensor, Formed]:
    """Running state and argmax as `engine.statistics`, and the active set of every tile that fits.

    Columns are marked against the log-sum-exp so far, which is at most the final one: what it marks
    is a superset.
    """
    n, backend, like = head.hidden.shape[0], head.backend, head.hidden
    state, argmax = backend.new_state(n, like.device)
    order = tiles(head, at)
    layout = nothing_kept(at, len(order))
    store = backend.scratch(like, at.capacity // like.element_size() if n else 0)
    sets = store.numel() > 0
    rows_of_blocks = at.blocks(slice(0, n)).stop if sets else 0
    tail_tiles = at.tails(slice(0, head.vocabulary)).stop if sets else 0
    marks = like.new_zeros((rows_of_blocks, head.vocabulary), dtype=torch.uint8)
    tails = like.new_zeros((4, tail_tiles, n), dtype=wide_dtype(like.dtype))
    used = 0
    for number, tile in enumerate(products(head, at, order)):
        engine.fold(head, tile, target, state, argmax, track)
        rows, columns, product = tile
        size, here = whole_elements(like, *product.shape), None
        if sets:
            top, log_sum = state[ref.MAX, rows], state[ref.SUM, rows].log()
            reference, found = mark(head, at, tile, target, top, log_sum)
            count = int(found.sum())
            if count < DENSE_SHARE * found.numel():
                here, size = found, count * at.block
        if used + size > store.numel():
            continue
        kind = DENSE if here is None else SPARSE
        layout[1 + number] = layout.new_tensor([kind, used, 0])
        if here is not None:
            marks[at.blocks(rows), columns] = here
            # Its own buffer: the sums of a tile are written in one piece.
            tails_here = tails.new_empty((4, *tails[0, at.tails(columns), rows].shape))
            tails_here[REFERENCE] = reference
            room = store[used : used + size].view(count, at.block)
            collect(head, at, tile, here, room, tails_here)
            tails[:, at.tails(columns), rows] = tails_here
        else:
            kept = store[used : used + size].view(product.shape[0], -1)
            kept[:, : product.shape[1]] = product
            kept[:, product.shape[1] :] = 0
        used += whole_lines(size)
    store = store[:used]
    if like.device.type != "cpu":  # where memory that was never touched is taken all the same
        store = store.clone()
    return state, argmax, Formed(marks, tails, layout, store)


def nothing_kept(at: Tiling, tiles: int) -> Tensor:
    """The layout of a set of which backward has to form everything."""
    head = torch.tensor([[at.rows, at.columns, at.block]], device="cpu")
    return torch.cat([head, head.new_tensor([[AGAIN, 0, 0]]).repeat(tiles, 1)])
