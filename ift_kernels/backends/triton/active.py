"""The active set: which columns matter to a block of rows, a tile of gradients split, bucket sums.

Floors per element of a tile: 2 bytes read (bf16) for the mask; 2 to 4 for the split, be it of
products or of gradients, of which a share k is written again; of the head's rows each is read once
for the sums. Distance: not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient
from ift_kernels.backends.layout_checks import (
    check_chunk,
    check_row_gradient,
    check_split_active_args,
    check_tail_weights,
    check_vectors,
    kernel_matrix,
)
from ift_kernels.backends.triton.common import (
    end_of,
    logits,
    padded,
    row_gradient,
    target_gradient,
    transform_arguments,
)
from ift_kernels.backends.triton.launch import blocks, config, launch, shape_class
from ift_kernels.common.transform import LogitTransform

PADDING = 32  # the active columns of a block are rounded up to this


@triton.jit(
    do_not_specialize=["rows", "columns", "offset", "column_blocks"],
    do_not_specialize_on_alignment=["target", "level"],
)
def mask_kernel(
    x, bias, target, level, mask_out,
    rows, columns, stride, offset, block, column_blocks,
    pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    number = program // column_blocks
    column = (program % column_blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside, readable = column < columns, column < end_of(columns, PADDED)
    b = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    # Masked out by the bias: their gradient is 0, not the mean of a tail.
    marked = tl.where(b == float("-inf"), 1, 0)
    for start in range(0, block, ROWS):
        row = number * block + start + tl.arange(0, ROWS)
        valid_row = row < rows
        pointer = x + row[:, None] * stride + column[None, :]
        z = tl.load(pointer, mask=valid_row[:, None] & readable[None, :], other=0.0).to(tl.float32)
        z = logits(z, b[None, :], pre, post, HAS_BIAS, HAS_CAP)
        limit = tl.load(level + row, mask=valid_row, other=float("inf")).to(tl.float32)
        local = tl.load(target + row, mask=valid_row, other=-1) - offset
        # "not ≤" rather than ">": a NaN must not be lost.
        low = (z <= limit[:, None]) & (local[:, None] != column[None, :])
        above = tl.where(low | ~valid_row[:, None], 0, 1)
        marked = tl.maximum(marked, tl.max(above, axis=0))
    tl.store(mask_out + number * columns + column, marked.to(tl.uint8), mask=inside)


def active_mask(chunk: Chunk, target: Tensor, level: Tensor, block: int) -> Tensor:
    rows, columns = check_chunk(chunk)
    x, bias, transform, offset = chunk
    check_vectors(rows, target=target, level=level)
    chosen = config("mask", shape_class(columns), x.device)
    column_blocks = blocks(columns, chosen["BLOCK"])
    mask = torch.empty((blocks(rows, block), columns), dtype=torch.uint8, device=x.device)
    launch(
        mask_kernel, (len(mask) * column_blocks,), x,
        x, bias, target, level, mask, rows, columns, x.stride(0), offset, block, column_blocks,
        **transform_arguments(bias, transform), PADDED=padded(x), **chosen,
    )  # fmt: skip
    return mask


@triton.jit
def tile_gradient(
    x, bias, target, of_target, norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform,  # of rows
    row, column, valid_row, inside, readable, stride, offset, pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, FORMS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile: of its products if it FORMS them, or as they are there."""
    pointer = x + row[:, None] * stride + column[None, :]
    value = tl.load(pointer, mask=valid_row[:, None] & readable[None, :], other=0.0).to(tl.float32)
    if FORMS:
        b = tl.zeros_like(column).to(tl.float32)
        if HAS_BIAS:
            b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        z = logits(value, b[None, :], pre, post, HAS_BIAS, HAS_CAP)
        is_target = column[None, :] == (target - offset)[:, None]
        value = row_gradient(
            z, is_target, of_target[:, None], norm_0[:, None], norm_1[:, None], c_target[:, None],
            c_prob[:, None], c_plogp[:, None], c_uniform[:, None], post, plain_slope, HAS_CAP,
        )  # fmt: skip
    return value


@triton.jit(
    do_not_specialize=["rows", "buckets", "norm_stride", "coef_stride", "offset"],
    do_not_specialize_on_alignment=["bias", "target", "norm", "coef"],
)
def split_kernel(
    x, bias, target, norm, coef, active_mask, position, starts, tail_weights, tail_gradient, active,
    rows, columns, stride, norm_stride, coef_stride, offset, block, bucket, buckets,
    pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, FORMS: tl.constexpr, PADDED: tl.constexpr,
    PADDING: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group, bucket_id = program // buckets, program % buckets
    row = group * ROWS + tl.arange(0, ROWS)
    valid_row = row < rows
    number = group * ROWS // block
    active_mask += number * columns
    position += number * columns
    first = (tl.program_id(0) % buckets) * bucket
    last = tl.minimum(first + bucket, columns)
    end = tl.minimum(first + bucket, end_of(columns, PADDED))
    target_id, zero = tl.full((ROWS,), -1, tl.int64), tl.zeros((ROWS,), tl.float32)
    norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform = zero, zero, zero, zero, zero, zero
    of_target = zero
    if FORMS:
        target_id = tl.load(target + row, mask=valid_row, other=-1)
        norm_0 = tl.load(norm + row, mask=valid_row, other=0.0).to(tl.float32)
        norm_1 = tl.load(norm + norm_stride + row, mask=valid_row, other=0.0).to(tl.float32)
        c_target = tl.load(coef + row, mask=valid_row, other=0.0).to(tl.float32)
        coef += coef_stride
        c_prob = tl.load(coef + row, mask=valid_row, other=0.0).to(tl.float32)
        coef += coef_stride
        c_plogp = tl.load(coef + row, mask=valid_row, other=0.0).to(tl.float32)
        coef += coef_stride
        c_uniform = tl.load(coef + row, mask=valid_row, other=0.0).to(tl.float32)
        local = target_id - offset
        here = valid_row & (local >= first) & (local < last)
        z = tl.load(x + row * stride + local, mask=here, other=0.0).to(tl.float32)
        b = zero
        if HAS_BIAS:
            b = tl.load(bias + local, mask=here, other=0.0).to(tl.float32)
        of_target = target_gradient(
            logits(z, b, pre, post, HAS_BIAS, HAS_CAP),
            norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform, post, plain_slope, HAS_CAP,
        )  # fmt: skip
    total = tl.zeros((ROWS,), tl.float32)
    weight = 0.0
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < last
        dz = tile_gradient(
            x, bias, target_id, of_target, norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform,
            row, column, valid_row, inside, column < end, stride, offset, pre, post, plain_slope,
            HAS_BIAS, HAS_CAP, FORMS,
        )  # fmt: skip
        tail = tl.load(active_mask + column, mask=inside, other=1) == 0
        # Not a product with 0 or 1: a NaN of an active column has no part in the sum.
        total += tl.sum(tl.where(tail[None, :], dz, 0.0), axis=1)
        share = tl.load(tail_weights + column, mask=inside, other=0.0)
        weight += tl.sum(tl.where(tail, share, 0.0), axis=0)
    u = tl.where(weight == 0.0, 0.0, total / weight)
    tl.store(tail_gradient + bucket_id * rows + row, u, mask=valid_row)

    count = tl.load(position + columns - 1)
    width = ((count + PADDING - 1) // PADDING * PADDING).to(tl.int64)
    out = active + tl.load(starts + number) + (row - number * block) * width
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < last
        dz = tile_gradient(
            x, bias, target_id, of_target, norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform,
            row, column, valid_row, inside, column < end, stride, offset, pre, post, plain_slope,
            HAS_BIAS, HAS_CAP, FORMS,
        )  # fmt: skip
        is_active = tl.load(active_mask + column, mask=inside, other=0) != 0
        slot = tl.load(position + column, mask=is_active, other=1) - 1
        share = tl.load(tail_weights + column, mask=is_active, other=0.0)
        centred = (dz - u[:, None] * share[None, :]).to(active.dtype.element_ty)
        written = valid_row[:, None] & is_active[None, :]
        tl.store(out[:, None] + slot[None, :], centred, mask=written)
    if bucket_id == buckets - 1:
        slot_beyond = count + tl.arange(0, PADDING)
        padding = valid_row[:, None] & (slot_beyond < width)[None, :]
        nothing = tl.zeros((ROWS, PADDING), active.dtype.element_ty)
        tl.store(out[:, None] + slot_beyond[None, :], nothing, mask=padding)


def split_active(
    chunk: Chunk,
    mask: Tensor,
    block: int,
    bucket: int,
    tail_weights: Tensor,
    tail_gradient: Tensor,
    active: Tensor,
    row_gradient: RowGradient | None = None,
) -> None:
    rows, columns = check_chunk(chunk)
    x, bias, transform, offset = chunk
    chosen = config("split", shape_class(columns), x.device)
    if block % chosen["ROWS"]:
        raise RuntimeError(f"block: expected a multiple of {chosen['ROWS']}, got {block}")
    _, buckets = check_split_active_args(
        x, mask, block, bucket, tail_weights, tail_gradient, active
    )
    of_rows: tuple[Tensor | None, ...] = (None, None, None)
    strides = 0, 0
    if row_gradient is None:
        bias, transform = None, LogitTransform()
    else:
        check_row_gradient(rows, row_gradient)
        of_rows = row_gradient
        strides = row_gradient.norm.stride(0), row_gradient.coef.stride(0)
    # How many active columns its block has up to a column, itself included; where the block begins.
    position = mask.cumsum(1, dtype=torch.int32)
    elements = (position[:, -1].long() + (PADDING - 1)) // PADDING * PADDING * block
    starts = elements.cumsum(0) - elements
    launch(
        split_kernel, (blocks(rows, chosen["ROWS"]) * buckets,), x,
        x, bias, *of_rows, mask, position, starts, tail_weights, tail_gradient, active,
        rows, columns, x.stride(0), *strides, offset, block, bucket, buckets,
        **transform_arguments(bias, transform), FORMS=row_gradient is not None, PADDED=padded(x),
        PADDING=PADDING, **chosen,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def bucket_sums_kernel(
    matrix, tail_weights, sums, count, width, stride, bucket,
    ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sums[bucket] = Σ tail_weights[v]·matrix[v]`` over the bucket's rows."""
    number = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    lane = tl.arange(0, ITEMS)
    total = tl.zeros((BLOCK,), tl.float32)
    first = number * bucket
    last = tl.minimum(first + bucket, count)
    for start in range(first, last, ITEMS):
        row = start + lane
        pointer = matrix + row[:, None] * stride + column[None, :]
        valid = (row < last)[:, None] & inside[None, :]
        value = tl.load(pointer, mask=valid, other=0.0).to(tl.float32)
        share = tl.load(tail_weights + row, mask=row < last, other=0.0)
        total += tl.sum(value * share[:, None], axis=0)
    tl.store(sums + number * width + column, total, mask=inside)


def bucket_sums(matrix: Tensor, bucket: int, tail_weights: Tensor) -> Tensor:
    matrix = kernel_matrix(matrix)
    count, width = matrix.shape
    check_tail_weights(tail_weights, count)
    sums = torch.empty((blocks(count, bucket), width), dtype=torch.float32, device=matrix.device)
    chosen = config("segments", shape_class(width), matrix.device)
    launch(
        bucket_sums_kernel, (len(sums), blocks(width, chosen["BLOCK"])), matrix,
        matrix, tail_weights, sums, count, width, matrix.stride(0), bucket, **chosen,
    )  # fmt: skip
    return sums
