"""Which columns of a tile matter to a block of rows; their products, and sums of the rest.

Floors per element: 2 bytes read (bf16) for the marks and 2 for the products and sums, of which a
share k is written again; one exponential and some 15 float operations. Distance: not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.triton.common import logits, slope, transform_arguments
from ift_kernels.backends.triton.launch import (
    blocks,
    check_rows,
    check_vectors,
    config,
    launch,
    shape_class,
)
from ift_kernels.transform import LogitTransform


@triton.jit(do_not_specialize=["rows", "offset", "column_blocks"])
def marks_kernel(
    x, bias, target, level, marks,
    rows, columns, stride, offset, block, column_blocks,
    gain, height, rate,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    number = program // column_blocks
    column = (program % column_blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    b = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    # Masked out by the bias: their gradient is 0, not the mean of a tail.
    marked = tl.where(b == float("-inf"), 1, 0)
    for start in range(0, block, ROWS):
        row = number * block + start + tl.arange(0, ROWS)
        there = row < rows
        at = x + row[:, None] * stride + column[None, :]
        z = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        z = logits(z, b[None, :], gain, height, HAS_BIAS, HAS_CAP)
        least = tl.load(level + row, mask=there, other=float("inf")).to(tl.float32)
        local = tl.load(target + row, mask=there, other=-1) - offset
        # "not ≤" rather than ">": a NaN must not be lost.
        low = (z <= least[:, None]) & (local[:, None] != column[None, :])
        above = tl.where(low | ~there[:, None], 0, 1)
        marked = tl.maximum(marked, tl.max(above, axis=0))
    tl.store(marks + number * columns + column, marked.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def collect_kernel(
    x, bias, marks, position, reference, store, sums,
    rows, columns, stride, kind_stride, tile_stride, block, tile, tiles,
    gain, height, rate,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group, number = program // tiles, program % tiles
    row = group * ROWS + tl.arange(0, ROWS)
    there = row < rows
    in_block = row - group * ROWS // block * block
    marks += group * ROWS // block * columns
    position += group * ROWS // block * columns
    origin = tl.load(reference + row, mask=there, other=0.0).to(tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    mass_z, slopes = mass, mass
    first = (tl.program_id(0) % tiles) * tile
    last = tl.minimum(first + tile, columns)
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns  # tiles end with blocks
        at = x + row[:, None] * stride + column[None, :]
        raw = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
        b = tl.zeros((BLOCK,), tl.float32)
        if HAS_BIAS:
            b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        marked = tl.load(marks + column, mask=inside, other=1) != 0
        tail = ~marked[None, :] & there[:, None]
        z = logits(raw.to(tl.float32), b[None, :], gain, height, HAS_BIAS, HAS_CAP)
        centred = z - origin[:, None]
        s = slope(z, height, 1.0, HAS_CAP)
        e = tl.where(tail, tl.exp(centred) * s, 0.0)
        mass += tl.sum(e, axis=1)
        mass_z += tl.sum(tl.where(e == 0.0, 0.0, e * centred), axis=1)
        slopes += tl.sum(tl.where(tail, s, 0.0), axis=1)
        kept = marked & inside
        slot = tl.load(position + column, mask=kept, other=1).to(tl.int64) - 1
        out = store + slot[None, :] * block + in_block[:, None]
        everywhere = tl.full((ROWS, 1), True, tl.int1)  # also beyond the last row: zeros
        tl.store(out, raw, mask=kept[None, :] & everywhere)
    sums += number * tile_stride + row
    tl.store(sums, mass, mask=there)
    tl.store(sums + kind_stride, mass_z, mask=there)
    tl.store(sums + 2 * kind_stride, slopes, mask=there)


def active_marks(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    level: Tensor,
    block: int,
) -> Tensor:
    rows, columns = x.shape
    check_rows("x", x)
    check_vectors(rows, target=target, level=level)
    check_vectors(columns, bias=bias)
    chosen = config("marks", shape_class(columns), x.device)
    column_blocks = blocks(columns, chosen["BLOCK"])
    marks = torch.empty((blocks(rows, block), columns), dtype=torch.uint8, device=x.device)
    launch(
        marks_kernel, (len(marks) * column_blocks,), x,
        x, bias, target, level, marks, rows, columns, x.stride(0), offset, block, column_blocks,
        **transform_arguments(bias, transform), **chosen,
    )  # fmt: skip
    return marks


def active_collect(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    marks: Tensor,
    reference: Tensor,
    tile: int,
    store: Tensor,
    sums: Tensor,
) -> None:
    (rows, columns), block = x.shape, store.shape[1]
    tiles, number = blocks(columns, tile), blocks(rows, block)
    check_rows("x", x)
    check_vectors(rows, reference=reference)
    check_vectors(columns, bias=bias)
    if marks.shape != (number, columns) or not marks.is_contiguous():
        raise RuntimeError(f"marks: {tuple(marks.shape)} for {tuple(x.shape)}, blocks of {block}")
    if not store.is_contiguous() or store.dtype != x.dtype:
        raise RuntimeError(f"store: {store.dtype} {tuple(store.shape)}")
    if sums.shape != (3, tiles, rows) or (rows > 1 and sums.stride(2) != 1):
        raise RuntimeError(f"sums: {tuple(sums.shape)}, strides {sums.stride()}")
    # Where in the store a marked column is: how many come before it, itself included.
    position = marks.flatten().cumsum(0, dtype=torch.int32)
    chosen = config("collect", shape_class(columns), x.device)
    launch(
        collect_kernel, (number * (block // chosen["ROWS"]) * tiles,), x,
        x, bias, marks, position, reference, store, sums, rows, columns, x.stride(0),
        sums.stride(0), sums.stride(1), block, tile, tiles,
        **transform_arguments(bias, transform), **chosen,
    )  # fmt: skip
