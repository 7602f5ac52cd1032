"""The epilogues of the active set in C++: csrc/cpu/isa/active.cpp. See reference/active.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ift_kernels.backends.contract import ActiveColumns, Chunk, RowGradient, TakenColumns
from ift_kernels.backends.cpu.dlogits import dlogits_
from ift_kernels.backends.cpu.extension import compiled, products_of
from ift_kernels.backends.layout_checks import (
    DTYPES,
    check_tail_weights,
    check_take_active_args,
    mark_active_args,
)
from ift_kernels.backends.reference.active import bucket_counts
from ift_kernels.backends.reference.active import bucket_sums as reference_bucket_sums


def mark_active(
    chunk: Chunk,
    row_gradient: RowGradient,
    log_threshold: float,
    block: int,
    bucket: int,
    tail_weights: Tensor | None,
) -> ActiveColumns:
    """Without tail gradients: they are formed once the tile, still in cache, is its gradient."""
    level, mask = mark_active_args(chunk, row_gradient, log_threshold, block)
    compiled().active_mask(
        products_of(chunk), row_gradient.target.data_ptr(), level.data_ptr(), block, mask.data_ptr()
    )
    return ActiveColumns(mask, bucket_counts(mask, bucket), None)


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
    if row_gradient is not None:  # in place, while the tile is in cache
        dlogits_(chunk, row_gradient)
    dz, mask = chunk.x, columns.mask.contiguous()
    buckets = check_take_active_args(dz, mask, block, bucket, tail_weights, active)
    tail_gradient = dz.new_empty((buckets, len(dz)), dtype=torch.float32)
    compiled().split_active(
        products_of(Chunk(dz)),
        mask.data_ptr(),
        block,
        bucket,
        tail_weights.data_ptr(),
        tail_gradient.data_ptr(),
        active.data_ptr(),
        active.numel(),
    )
    of_blocks = columns.counts.sum(1, dtype=torch.int32)
    return TakenColumns(mask.nonzero()[:, 1], of_blocks, tail_gradient)


def bucket_sums(matrix: Tensor, bucket: int, tail_weights: Tensor) -> Tensor:
    if matrix.dtype not in DTYPES or matrix.stride(1) != 1:
        return reference_bucket_sums(matrix, bucket, tail_weights)
    count, width = matrix.shape
    check_tail_weights(tail_weights, count)
    sums = matrix.new_empty((-(-count // bucket), width), dtype=torch.float32)
    compiled().bucket_sums(
        DTYPES[matrix.dtype],
        matrix.data_ptr(),
        count,
        width,
        matrix.stride(0),
        bucket,
        tail_weights.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums
