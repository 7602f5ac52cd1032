"""Active columns of a tile, listed and copied.

Floors: a byte of the mask read for each column of a block; of the active columns, a share k of a
tile, whole sectors of 32 bytes read, and 2 bytes (bf16) an element written. Distance: not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.contract import ActiveColumns, Chunk, RowGradient, TakenColumns
from ift_kernels.backends.layout_checks import (
    check_chunk,
    check_row_gradient,
    check_tail_gradient,
    check_take_active_args,
)
from ift_kernels.backends.reference.active import PADDING
from ift_kernels.backends.triton.active import load_coefficients, sum_tail
from ift_kernels.backends.triton.common import (
    logits,
    row_gradient,
    target_gradient,
    transform_arguments,
)
from ift_kernels.backends.triton.launch import blocks, config, launch, shape_class
from ift_kernels.common.transform import LogitTransform

AT_ONCE = 128  # counts that are added up at once


@triton.jit
def blocks_before(counts, number, PADDING: tl.constexpr, AT_ONCE: tl.constexpr):
    """Active columns of all blocks before this one, and in lots of PADDING."""
    columns = tl.zeros((AT_ONCE,), tl.int64)
    lots = tl.zeros((AT_ONCE,), tl.int64)
    for start in range(0, number, AT_ONCE):
        other = start + tl.arange(0, AT_ONCE)
        count = tl.load(counts + other, mask=other < number, other=0)
        columns += count
        lots += tl.cdiv(count, PADDING)
    return tl.sum(columns), tl.sum(lots)


@triton.jit(do_not_specialize=["columns", "mask_stride", "buckets"],
            do_not_specialize_on_alignment=["mask", "counts"])  # fmt: skip
def list_kernel(
    mask, counts, ids, totals,
    columns, mask_stride, bucket, buckets, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The ids of a block's active columns in a bucket, behind those of all before."""
    program = tl.program_id(0)
    number, bucket_id = program // buckets, program % buckets
    lane = tl.arange(0, AT_ONCE)
    before = tl.zeros((AT_ONCE,), tl.int64)
    for start in range(0, program, AT_ONCE):
        before += tl.load(counts + start + lane, mask=start + lane < program, other=0)
    if bucket_id == 0:
        of_block = tl.zeros((AT_ONCE,), tl.int32)
        for start in range(0, buckets, AT_ONCE):
            there = start + lane < buckets
            of_block += tl.load(counts + program + start + lane, mask=there, other=0)
        tl.store(totals + number, tl.sum(of_block))
    ids += tl.sum(before)
    mask += number.to(tl.int64) * mask_stride
    first = bucket_id * bucket
    last = tl.minimum(first + bucket, columns)
    found = 0
    for start in range(first, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        marked = tl.load(mask + column, mask=column < last, other=0).to(tl.int32)
        place = found + tl.cumsum(marked, axis=0) - 1
        tl.store(ids + place, column.to(tl.int64), mask=marked != 0)
        found += tl.sum(marked)


@triton.jit(
    do_not_specialize=["rows", "lots", "bucket", "norm_stride", "coef_stride", "offset"],
    do_not_specialize_on_alignment=["x", "bias", "target", "norm", "coef", "stride", "totals"],
)
def take_kernel(
    x, bias, target, norm, coef, ids, totals, tail_weights, tail_gradient, active,
    rows, stride, norm_stride, coef_stride, offset, block, bucket, lots, pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, FORMS: tl.constexpr, PADDING: tl.constexpr,
    AT_ONCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK active columns of ROWS rows, which are of one block."""
    program = tl.program_id(0)
    group, lot = (program // lots).to(tl.int64), program % lots
    row = group * ROWS + tl.arange(0, ROWS)
    valid_row = row < rows
    number = (group * ROWS // block).to(tl.int32)
    count = tl.load(totals + number)
    width = tl.cdiv(count, PADDING) * PADDING
    slot = lot * BLOCK + tl.arange(0, BLOCK)
    if lot * BLOCK < width:
        ids_before, lots_before = blocks_before(totals, number, PADDING, AT_ONCE)
        there = slot < count
        column = tl.load(ids + ids_before + slot, mask=there, other=0)
        read = valid_row[:, None] & there[None, :]
        dz = tl.load(x + row[:, None] * stride + column[None, :], mask=read, other=0.0)
        dz = dz.to(tl.float32)
        if FORMS:
            norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform = load_coefficients(
                norm, coef, row, valid_row, norm_stride, coef_stride
            )
            local = tl.load(target + row, mask=valid_row, other=-1) - offset
            b = tl.zeros((BLOCK,), tl.float32)
            if HAS_BIAS:
                b = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
            z = logits(dz, b[None, :], pre, post, HAS_BIAS, HAS_CAP)
            of_target = target_gradient(
                z, norm_0[:, None], norm_1[:, None], c_target[:, None], c_prob[:, None],
                c_plogp[:, None], c_uniform[:, None], post, plain_slope, HAS_CAP,
            )  # fmt: skip
            dz = row_gradient(
                z, column[None, :] == local[:, None], of_target, norm_0[:, None], norm_1[:, None],
                c_target[:, None], c_prob[:, None], c_plogp[:, None], c_uniform[:, None], post,
                plain_slope, HAS_CAP,
            )  # fmt: skip
        share = tl.load(tail_weights + column, mask=there, other=0.0)
        tail = tail_gradient + (column // bucket * rows)[None, :] + row[:, None]
        u = tl.load(tail, mask=read, other=0.0)
        dz = tl.where(read, dz - u * share[None, :], 0.0).to(active.dtype.element_ty)
        active += lots_before * block * PADDING
        at = (row - number * block) * width
        written = valid_row[:, None] & (slot < width)[None, :]
        tl.store(active + at[:, None] + slot[None, :], dz, mask=written)


def take_active(
    chunk: Chunk,
    columns: ActiveColumns,
    block: int,
    bucket: int,
    tail_weights: Tensor,
    active: Tensor,
    counts: Sequence[int],
    row_gradient: RowGradient | None = None,
) -> TakenColumns:
    rows, _ = check_chunk(chunk)
    mask, (x, bias, transform, offset) = columns.mask, chunk
    buckets = check_take_active_args(x, mask, block, bucket, tail_weights, active)
    if columns.tail_gradient is None:
        columns = sum_tail(chunk, row_gradient, mask, block, bucket, tail_weights)
    _, of_buckets, tail = columns
    assert tail is not None
    check_tail_gradient(tail, buckets, rows)
    totals = of_buckets.new_empty(len(mask))
    ids = of_buckets.new_empty(sum(counts), dtype=torch.int64)
    chosen = config("list", shape_class(mask.shape[1]), x.device)
    launch(
        list_kernel, (len(mask) * buckets,), x,
        mask, of_buckets.contiguous(), ids, totals, mask.shape[1], mask.stride(0), bucket,
        buckets, AT_ONCE=AT_ONCE, **chosen,
    )  # fmt: skip
    of_rows: tuple[Tensor | None, ...] = (None, None, None)
    strides = 0, 0
    if row_gradient is None:
        bias, transform = None, LogitTransform()
    else:
        check_row_gradient(rows, row_gradient)
        of_rows = row_gradient
        strides = row_gradient.norm.stride(0), row_gradient.coef.stride(0)
    chosen = config("take", shape_class(x.shape[1]), x.device)
    if block % chosen["ROWS"]:
        raise RuntimeError(f"block: expected a multiple of {chosen['ROWS']}, got {block}")
    lots = blocks(blocks(max(counts, default=0), PADDING) * PADDING, chosen["BLOCK"])
    launch(
        take_kernel, (blocks(rows, chosen["ROWS"]) * lots,), x,
        x, bias, *of_rows, ids, totals, tail_weights, tail, active,
        rows, x.stride(0), *strides, offset, block, bucket, lots,
        **transform_arguments(bias, transform), FORMS=row_gradient is not None, PADDING=PADDING,
        AT_ONCE=AT_ONCE, **chosen,
    )  # fmt: skip
    return TakenColumns(ids, totals, tail)
