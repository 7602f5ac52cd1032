"""The schedule of `linear_divergence`: which products are formed when, and what is kept.

Both heads' products are read up to three times: for the log-sum-exps, for the sums that centre
the gradient (see `backends.reference.divergence`), for the gradient. A *block* of rows keeps its
products over the whole vocabulary for that, so they are formed once, 2 products of N·V·D, and dh
and dW are 2 more. dW wants a tile's gradient from all rows at once, written once:

* all rows are one block, if that fits;
* or dW is summed over blocks in place, if its dtype can hold sums;
* or each block leaves its gradient in the columns that are *held* for all rows, as many as fit. For
  the others the products of both heads are formed once more in the end: up to 6 products.

Where not even `MIN_BLOCK` rows fit, and in a backward of its own, every pass is a *sweep*: tiles
formed anew, the vocabulary outermost.
"""

from __future__ import annotations

from dataclasses import dataclass

from ift_kernels.backends import reference
from ift_kernels.schedule import device, plan
from ift_kernels.schedule.head import Head

MIN_BLOCK = 64  # rows; fewer make thin products, slower than forming them three times
ALIGN = 32  # rows of a block, unless it is the last
# Rows by which a block counts as longer than it is: every block reads both weights anew. Products
# of 64 rows take 1.3 times as long as of 512, of 128 rows 1.1 times (Zen 4).
BLOCK_COST = 20
IN_TORCH = 40  # bytes that an epilogue of plain torch takes beside an element of a tile
Heads = tuple[Head, Head]  # student, teacher
Needs = tuple[bool, bool, bool]  # gradients of hidden, weight, bias


@dataclass(frozen=True)
class Layout:
    """Sizes that keep a call inside its workspace."""

    tile_rows: int  # of a sweep
    tile_columns: int
    hidden_rows: int  # whose float32 sum of dh a sweep holds at once
    block: int  # rows; 0: no blocks, only sweeps
    held: int  # columns
    block_columns: int  # of a block's tiles; `held` is a multiple, or all


def layout(heads: Heads, workspace: int, need_hidden: bool, need_weight: bool) -> Layout:
    """The cheapest sizes for a call that forms the gradients of hidden and weight asked for."""
    student = heads[0]
    (n, width), vocabulary = student.hidden.shape, student.vocabulary
    own, other = (head.dtype.itemsize for head in heads)
    flip = own * (need_weight and student.backend.wants_transpose(student.dtype))
    cast = sum(
        (not head.reads_weight) * head.weight.shape[1] * size
        for head, size in zip(heads, (own, other), strict=True)
    )
    same, operand = student.reads_weight, student.hidden.element_size()
    rounded = operand * (operand != own)  # a tile's gradient once more
    sums = width * (operand + 4)  # of dW's columns, unless a tile writes them once
    gpu = device.of(student.hidden.device).is_gpu
    # In cache for the epilogues of a CPU; launches of a GPU take long beside such tiles.
    tile_bytes = workspace if gpu else plan.TILE_BYTES
    budget = min(tile_bytes, workspace // 4)
    in_torch = student.backend.divergence_gradient_ is reference.divergence_gradient_
    per_element = own + other + flip + rounded + (gpu and in_torch) * IN_TORCH
    per_column = cast + sums * (need_weight and not same)
    tile_rows, columns = plan.tile(n, vocabulary, per_element, budget, per_column, tile_bytes)
    if need_weight and same and tile_rows < n:
        per_column = cast + sums
        tile_rows, columns = plan.tile(n, vocabulary, per_element, budget, per_column, tile_bytes)
    per_row = need_hidden * width * (operand + 4)
    hidden_rows = n
    if n * per_row > workspace // 2:
        hidden_rows = max(1, workspace // 2 // per_row)
    space = workspace - budget
    per_token = vocabulary * (own + other) + per_row
    fit = space // per_token

    def found(block: int, held: int) -> Layout:
        return Layout(tile_rows, columns, hidden_rows, block, held, block_columns(block))

    def block_columns(block: int) -> int:
        """A block has fewer rows than a sweep's tile; on a GPU its tiles are as much wider."""
        wide = budget // per_element // max(block, 1) // 256 * 256 if gpu else 0
        return min(max(wide, columns), vocabulary)

    if fit >= n:
        return found(max(n, 1), vocabulary)
    if fit < MIN_BLOCK:
        return found(0, 0)
    if not need_weight or in_place(student):
        return found(_even(n, fit), 0)

    def held(block: int) -> int:
        fitting, step = (space - block * per_token) // ((n - block) * own), block_columns(block)
        return vocabulary if fitting >= vocabulary else fitting // step * step

    def cost(block: int) -> float:
        """In products of N·V·D, less that for dW: two and dh by blocks, two where none is held."""
        blocks = -(-n // block)
        return 3 * (1 + BLOCK_COST * blocks / n) + 2 * (1 - held(block) / vocabulary)

    block = min((_even(n, rows) for rows in range(MIN_BLOCK, fit + 1, ALIGN)), key=cost)
    return found(block, held(block))


def in_place(head: Head) -> bool:
    """Whether dW can be summed over blocks in place."""
    return head.reads_weight and head.weight.dtype.itemsize >= 4


def _even(rows: int, most: int) -> int:
    """Rows of a block, at most `most`: all blocks about the same."""
    block = -(-rows // -(-rows // most))
    return min(most, -(-block // ALIGN) * ALIGN)
