"""The active set: which columns matter to a block of rows, sums of the tail and of head rows.

Floors per element of a tile: 2 bytes read (bf16) for the mask and the sums of the tail, in one
pass; of the head's rows each is read once for the sums. Distance: not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.contract import ActiveColumns, Chunk, RowGradient
from ift_kernels.backends.layout_checks import (
    check_chunk,
    check_row_gradient,
    check_tail_weights,
    kernel_matrix,
)
from ift_kernels.backends.reference.active import bucket_counts
from ift_kernels.backends.triton.common import (
    end_of,
    logits,
    nontarget_gradient,
    padded,
    transform_arguments,
    without_upstream,
)
from ift_kernels.backends.triton.launch import blocks, config, launch, power_of_two, shape_class
from ift_kernels.common.transform import LogitTransform


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


@triton.jit
def load_coefficients(
    norm, coef, row, valid_row, norm_stride, coef_stride,
):  # fmt: skip
    """Of rows: both parts of the log-sum-exp, and the four coefficients of `dlogits_`."""
    norm_0 = tl.load(norm + row, mask=valid_row, other=0.0).to(tl.float32)
    norm_1 = tl.load(norm + norm_stride + row, mask=valid_row, other=0.0).to(tl.float32)
    c_target = tl.load(coef + row, mask=valid_row, other=0.0).to(tl.float32)
    coef += coef_stride
    c_prob = tl.load(coef + row, mask=valid_row, other=0.0).to(tl.float32)
    coef += coef_stride
    c_plogp = tl.load(coef + row, mask=valid_row, other=0.0).to(tl.float32)
    coef += coef_stride
    c_uniform = tl.load(coef + row, mask=valid_row, other=0.0).to(tl.float32)
    return norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "buckets", "mask_stride", "norm_stride", "coef_stride", "offset", "block"
    ],
    do_not_specialize_on_alignment=["bias", "target", "norm", "coef", "mask"],
)  # fmt: skip
def mark_kernel(
    x, bias, target, norm, coef, mask, counts, tail_weights, tail_gradient,
    rows, columns, stride, mask_stride, norm_stride, coef_stride, offset, log_threshold,
    block, bucket, buckets, pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, FORMS: tl.constexpr, MARKS: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of a tile: of ROWS rows and a bucket the mask, if it MARKS, and the tail gradient.

    A block has at most ROWS rows if it MARKS, else a multiple of ROWS. Of gradients unless it FORMS
    them of products.
    """
    program = tl.program_id(0).to(tl.int64)
    group, bucket_id = program // buckets, program % buckets
    size, number = ROWS, group * ROWS // block
    if MARKS:
        size, number = block, group
    lane = tl.arange(0, ROWS)
    row = group * size + lane
    valid_row = (row < rows) & (lane < size)
    mask += number * mask_stride
    first = (tl.program_id(0) % buckets) * bucket
    last = tl.minimum(first + bucket, columns)
    end = tl.minimum(first + bucket, end_of(columns, PADDED))
    zero = tl.zeros((ROWS,), tl.float32)
    norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform = zero, zero, zero, zero, zero, zero
    if FORMS:
        norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform = load_coefficients(
            norm, coef, row, valid_row, norm_stride, coef_stride
        )
    local, level = tl.full((ROWS,), -1, tl.int64), zero
    if MARKS:
        local = tl.load(target + row, mask=valid_row, other=-1) - offset
        level = norm_0 + norm_1 + log_threshold
    total = zero
    weight = 0.0
    count = 0
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < last
        pointer = x + row[:, None] * stride + column[None, :]
        readable = valid_row[:, None] & (column < end)[None, :]
        dz = tl.load(pointer, mask=readable, other=0.0).to(tl.float32)
        b = tl.zeros((BLOCK,), tl.float32)
        if FORMS:
            if HAS_BIAS:
                b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            z = logits(dz, b[None, :], pre, post, HAS_BIAS, HAS_CAP)
        if MARKS:
            # "not ≤" rather than ">": a NaN must not be lost.
            low = (z <= level[:, None]) & (local[:, None] != column[None, :])
            marked = tl.max(tl.where(low | ~valid_row[:, None], 0, 1), axis=0)
            # Masked out by the bias: their gradient is 0, not the mean of a tail.
            marked = tl.where(b == float("-inf"), 1, marked)
            tl.store(mask + column, marked.to(tl.uint8), mask=inside)
        else:
            marked = tl.load(mask + column, mask=inside, other=0).to(tl.int32)
        if FORMS:  # targets are active
            dz = nontarget_gradient(
                z, norm_0[:, None], norm_1[:, None], c_target[:, None], c_prob[:, None],
                c_plogp[:, None], c_uniform[:, None], post, plain_slope, HAS_CAP,
            )  # fmt: skip
        tail = inside & (marked == 0)
        # Not a product with 0 or 1: a NaN of an active column has no part in the sum.
        total += tl.sum(tl.where(tail[None, :], dz, 0.0), axis=1)
        share = tl.load(tail_weights + column, mask=inside, other=0.0)
        weight += tl.sum(tl.where(tail, share, 0.0), axis=0)
        count += tl.sum(tl.where(inside, marked, 0), axis=0)
    if FORMS:
        total = without_upstream(total, c_target, c_prob, c_plogp, c_uniform)
    u = tl.where(weight == 0.0, 0.0, total / weight)
    tl.store(tail_gradient + bucket_id * rows + row, u, mask=valid_row)
    if MARKS or group * ROWS % block == 0:  # the first of its block
        tl.store(counts + number * buckets + bucket_id, count)


def mark_active(
    chunk: Chunk,
    row_gradient: RowGradient,
    log_threshold: float,
    block: int,
    bucket: int,
    tail_weights: Tensor | None,
) -> ActiveColumns:
    rows, columns = check_chunk(chunk)
    x, bias, transform, offset = chunk
    check_row_gradient(rows, row_gradient)
    mask = torch.empty((blocks(rows, block), columns), dtype=torch.uint8, device=x.device)
    chosen = config("mark", shape_class(columns), x.device)
    # Rows that begin anywhere take twice the registers.
    if tail_weights is not None and block <= chosen["ROWS"] and padded(x):
        return sum_tail(chunk, row_gradient, mask, block, bucket, tail_weights, log_threshold)
    chosen = config("mask", shape_class(columns), x.device)
    column_blocks, target = blocks(columns, chosen["BLOCK"]), row_gradient.target
    level = row_gradient.norm.sum(0) + log_threshold
    launch(
        mask_kernel, (len(mask) * column_blocks,), x,
        x, bias, target, level, mask, rows, columns, x.stride(0), offset, block, column_blocks,
        **transform_arguments(bias, transform), PADDED=padded(x), **chosen,
    )  # fmt: skip
    if tail_weights is not None:
        return sum_tail(chunk, row_gradient, mask, block, bucket, tail_weights)
    return ActiveColumns(mask, bucket_counts(mask, bucket), None)


def sum_tail(
    chunk: Chunk,
    row_gradient: RowGradient | None,
    mask: Tensor,
    block: int,
    bucket: int,
    tail_weights: Tensor,
    log_threshold: float | None = None,
) -> ActiveColumns:
    """`mask`, which is written where there is a threshold, its counts, and the tail gradient.

    Of gradients where there is no `row_gradient`.
    """
    (rows, columns), marks = chunk.x.shape, log_threshold is not None
    x, bias, transform, offset = chunk
    check_tail_weights(tail_weights, columns)
    tail_gradient = x.new_empty((blocks(columns, bucket), rows), dtype=torch.float32)
    counts = mask.new_empty((len(mask), len(tail_gradient)), dtype=torch.int32)
    chosen = dict(config("mark", shape_class(columns), x.device))
    # A power of two that has the block, or divides it; fewer rows than usual with more columns.
    most = chosen["ROWS"]
    chosen["ROWS"] = power_of_two(block) if marks else min(most, block & -block)
    if padded(x):
        chosen["BLOCK"] *= most // chosen["ROWS"]
    of_rows: tuple[Tensor | None, ...] = (None, None, None)
    strides = 0, 0
    if row_gradient is None:
        bias, transform = None, LogitTransform()
    else:
        of_rows = row_gradient
        strides = row_gradient.norm.stride(0), row_gradient.coef.stride(0)
    groups, buckets = blocks(rows, block if marks else chosen["ROWS"]), len(tail_gradient)
    launch(
        mark_kernel, (groups * buckets,), x,
        x, bias, *of_rows, mask, counts, tail_weights, tail_gradient,
        rows, columns, x.stride(0), mask.stride(0), *strides, offset, log_threshold or 0.0,
        block, bucket, buckets, **transform_arguments(bias, transform),
        FORMS=row_gradient is not None, MARKS=marks, PADDED=padded(x), **chosen,
    )  # fmt: skip
    return ActiveColumns(mask, counts, tail_gradient)


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
