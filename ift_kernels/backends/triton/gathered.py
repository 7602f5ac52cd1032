"""Products of active columns with their head rows, which are read where they lie.

Floors: 2·k·N·V·D operations at an active share k; bytes, for every block k·V head rows read and
their sum read and written. What it saves beside `index_select` and a vendor product for every block
is a write and a read of these rows and a launch for each; what it loses is how much slower its
product is than the vendor's. Distance: not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.layout_checks import check_rows, check_vectors
from ift_kernels.backends.reference.active import PADDING
from ift_kernels.backends.triton.common import precision, product
from ift_kernels.backends.triton.launch import blocks, config, launch, power_of_two
from ift_kernels.backends.triton.take import AT_ONCE, blocks_before


@triton.jit(do_not_specialize=["rows", "row_tiles", "column_tiles"])
def gathered_kernel(
    active, counts, ids, weight, total, others,
    rows, width, weight_stride, total_stride, block, row_tiles, column_tiles,
    PADDING: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Programs next to each other share the ids of a block and its active columns.
    tile = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    number = tile // row_tiles
    row, in_block = tl.arange(0, ROWS), tile % row_tiles * ROWS
    first = number.to(tl.int64) * block + in_block
    valid_row = (row < block - in_block) & (row < rows - first)
    inside = column < width
    count = tl.load(counts + number)
    padded_count = tl.cdiv(count, PADDING) * PADDING
    columns_before, lots_before = blocks_before(counts, number, PADDING, AT_ONCE)
    active += lots_before * block * PADDING + in_block.to(tl.int64) * padded_count
    ids += columns_before
    lane = tl.arange(0, INNER)
    # Rows beyond the block are the last one again, and are not written.
    at = tl.minimum(row, block - in_block - 1) * padded_count
    written = valid_row[:, None] & inside[None, :]
    part, parts = tl.program_id(1), tl.num_programs(1)
    if part > 0:  # a sum of its own
        total = others + (part - 1).to(tl.int64) * rows * width
        total_stride = width
    pointer = total + first * total_stride + (row[:, None] * total_stride + column[None, :])
    x = tl.load(pointer, mask=written & (part == 0), other=0.0)
    steps = tl.cdiv(tl.cdiv(padded_count, INNER), parts) * INNER
    for k in range(part * steps, tl.minimum((part + 1) * steps, padded_count), INNER):
        slot = k + lane
        a_pointer = active + (at[:, None] + slot[None, :])
        a = tl.load(a_pointer, mask=(slot < padded_count)[None, :], other=0.0)
        # Against the zeros that pad the columns nothing is read: an infinity would make them NaN.
        there = slot < count
        v = tl.load(ids + slot, mask=there, other=0)
        w_pointer = weight + v[:, None] * weight_stride + column[None, :]
        w = tl.load(w_pointer, mask=there[:, None] & inside[None, :], other=0.0)
        x = product(a, w, x, PRECISION)
    tl.store(pointer, x, mask=written)


def add_active_products(
    active: Tensor,
    counts: Tensor,
    block: int,
    ids: Tensor,
    weight: Tensor,
    total: Tensor,
    parts: int = 1,
) -> bool:
    """``total[r] += Σ_v active[r, v]·weight[v]`` over the active columns v of the block of row r.

    `active`, `counts` and `ids` as of `take_active`; `total` (N, D) float32; `parts`: programs that
    divide the columns of a tile, where tiles are fewer than multiprocessors. False, with nothing
    done, where a vendor's product serves better (float32), or this cannot serve.
    """
    if active.dtype.itemsize != 2 or weight.dtype != active.dtype or weight.stride(1) != 1:
        return False
    (rows, width), number = total.shape, len(counts)
    check_rows("weight", weight, width)
    check_rows("total", total)
    if total.dtype != torch.float32 or number != blocks(rows, block):
        raise RuntimeError(f"total: {total.dtype} {tuple(total.shape)} for {number} of {block}")
    check_vectors(number, counts=counts)
    chosen = dict(config("gathered", "half", active.device))
    chosen["ROWS"] = min(chosen["ROWS"], power_of_two(block))
    row_tiles, column_tiles = blocks(block, chosen["ROWS"]), blocks(width, chosen["COLUMNS"])
    others = total.new_empty((parts - 1, rows, width))
    launch(
        gathered_kernel, (number * row_tiles * column_tiles, parts), active,
        active, counts, ids, weight, total, others,
        rows, width, weight.stride(0), total.stride(0), block, row_tiles, column_tiles,
        PADDING=PADDING, AT_ONCE=AT_ONCE, PRECISION=precision(active.dtype), **chosen,
    )  # fmt: skip
    for other in others:
        total += other
    return True
