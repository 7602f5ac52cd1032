"""A tile of gradients taken apart for dh: active columns row by row, and the rest as sums.

Floors per element: 2 bytes read (bf16), of which a share k is written again, and one addition. The
second read of a tile's rows is left to the caches, which also serve what tells where an active
column goes and what share of the tail it has: a byte, an int32 and a float32 per column, once for
every ROWS rows. Distance: not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.triton.launch import (
    blocks,
    check_rows,
    check_vectors,
    config,
    launch,
    shape_class,
)

PADDING = 32  # the active columns of a block are rounded up to this


@triton.jit(do_not_specialize=["rows", "tiles"])
def rows_kernel(
    dz, marks, position, starts, profile, mean, active,
    rows, columns, stride, block, tile, tiles,
    PADDING: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group, at_tile = program // tiles, program % tiles
    row = group * ROWS + tl.arange(0, ROWS)
    there = row < rows
    number = group * ROWS // block
    marks += number * columns
    position += number * columns
    first = (tl.program_id(0) % tiles) * tile
    last = tl.minimum(first + tile, columns)
    total = tl.zeros((ROWS,), tl.float32)
    spread = 0.0
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < last
        at = dz + row[:, None] * stride + column[None, :]
        x = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        tail = tl.load(marks + column, mask=inside, other=1) == 0
        # Not a product with 0 or 1: a NaN of an active column has no part in the sum.
        total += tl.sum(tl.where(tail[None, :], x, 0.0), axis=1)
        share = tl.load(profile + column, mask=inside, other=0.0)
        spread += tl.sum(tl.where(tail, share, 0.0), axis=0)
    u = tl.where(spread == 0.0, 0.0, total / spread)
    tl.store(mean + at_tile * rows + row, u, mask=there)

    count = tl.load(position + columns - 1)
    width = ((count + PADDING - 1) // PADDING * PADDING).to(tl.int64)
    out = active + tl.load(starts + number) + (row - number * block) * width
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < last
        at = dz + row[:, None] * stride + column[None, :]
        x = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        kept = tl.load(marks + column, mask=inside, other=0) != 0
        slot = tl.load(position + column, mask=kept, other=1) - 1
        share = tl.load(profile + column, mask=kept, other=0.0)
        centred = (x - u[:, None] * share[None, :]).to(active.dtype.element_ty)
        tl.store(out[:, None] + slot[None, :], centred, mask=there[:, None] & kept[None, :])
    if at_tile == tiles - 1:
        beyond = count + tl.arange(0, PADDING)
        padding = there[:, None] & (beyond < width)[None, :]
        nothing = tl.zeros((ROWS, PADDING), active.dtype.element_ty)
        tl.store(out[:, None] + beyond[None, :], nothing, mask=padding)


def active_rows(
    dz: Tensor,
    marks: Tensor,
    block: int,
    tile: int,
    profile: Tensor,
    mean: Tensor,
    active: Tensor,
) -> None:
    rows, columns = dz.shape
    tiles, number = blocks(columns, tile), blocks(rows, block)
    chosen = config("rows", shape_class(columns), dz.device)
    check_rows("dz", dz)
    check_vectors(columns, profile=profile)
    if marks.shape != (number, columns) or not marks.is_contiguous():
        raise RuntimeError(f"marks: {tuple(marks.shape)} for {tuple(dz.shape)}, blocks of {block}")
    if mean.shape != (tiles, rows) or mean.dtype != torch.float32 or not mean.is_contiguous():
        raise RuntimeError(f"mean: {mean.dtype} {tuple(mean.shape)}, strides {mean.stride()}")
    if active.dtype != dz.dtype or not active.is_contiguous():
        raise RuntimeError(f"active: {active.dtype}, strides {active.stride()}, for {dz.dtype}")
    if block % chosen["ROWS"]:
        raise RuntimeError(f"block: expected a multiple of {chosen['ROWS']}, got {block}")
    # How many active columns its block has up to a column, itself included; where the block begins.
    position = marks.cumsum(1, dtype=torch.int32)
    elements = (position[:, -1].long() + (PADDING - 1)) // PADDING * PADDING * block
    starts = elements.cumsum(0) - elements
    launch(
        rows_kernel, (blocks(rows, chosen["ROWS"]) * tiles,), dz,
        dz, marks, position, starts, profile, mean, active,
        rows, columns, dz.stride(0), block, tile, tiles, PADDING=PADDING, **chosen,
    )  # fmt: skip
