"""The epilogues of the active set in CUDA C++: csrc/cuda/active.cuh. See reference/active.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ift_kernels.backends.contract import ActiveColumns, Chunk, RowGradient, TakenColumns
from ift_kernels.backends.cuda.dlogits import dlogits_
from ift_kernels.backends.cuda.extension import compiled, products_of, queue_of
from ift_kernels.backends.layout_checks import (
    DTYPES,
    check_tail_weights,
    check_take_active_args,
    kernel_matrix,
    mark_active_args,
)
from ift_kernels.backends.reference.active import PADDING


def mark_active(
    chunk: Chunk,
    row_gradient: RowGradient,
    log_threshold: float,
    block: int,
    bucket: int,
    tail_weights: Tensor | None,
) -> ActiveColumns:
    level, mask = mark_active_args(chunk, row_gradient, log_threshold, block)
    queue, products = products_of(chunk)
    compiled().active_mask(
        queue, products, row_gradient.target.data_ptr(), level.data_ptr(), block, mask.data_ptr()
    )
    blocks, columns = mask.shape
    counts = torch.empty((blocks, -(-columns // bucket)), dtype=torch.int64, device=mask.device)
    compiled().mask_counts(queue, mask.data_ptr(), blocks, columns, bucket, counts.data_ptr())
    return ActiveColumns(mask, counts.to(torch.int32), None)


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
    if row_gradient is not None:
        dlogits_(chunk, row_gradient)
    dz, mask = chunk.x, columns.mask.contiguous()
    buckets = check_take_active_args(dz, mask, block, bucket, tail_weights, active)
    tail_gradient = dz.new_empty((buckets, len(dz)), dtype=torch.float32)
    queue, gradients = products_of(Chunk(dz))
    ends = columns.counts.cumsum(1)
    elements = (ends[:, -1] + (PADDING - 1)) // PADDING * PADDING * block
    starts = elements.cumsum(0) - elements
    compiled().split_active(
        queue,
        gradients,
        mask.data_ptr(),
        ends.data_ptr(),
        starts.data_ptr(),
        block,
        bucket,
        tail_weights.data_ptr(),
        tail_gradient.data_ptr(),
        active.data_ptr(),
    )
    ids = ids_of_known_count(mask, sum(counts))
    return TakenColumns(ids, ends[:, -1].to(torch.int32), tail_gradient)


def ids_of_known_count(mask: Tensor, count: int) -> Tensor:
    """``mask.nonzero()[:, 1]`` of (blocks, C); a GPU would wait for that to count them."""
    found = mask.flatten() != 0
    place = found.cumsum(0).sub_(1).masked_fill_(~found, count)
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).reshape(-1)
    return place.new_empty(count + 1).scatter_(0, place, columns)[:count]


def bucket_sums(matrix: Tensor, bucket: int, tail_weights: Tensor) -> Tensor:
    matrix = kernel_matrix(matrix)
    count, width = matrix.shape
    check_tail_weights(tail_weights, count)
    sums = torch.empty((-(-count // bucket), width), dtype=torch.float32, device=matrix.device)
    compiled().bucket_sums(
        queue_of(matrix.device),
        DTYPES[matrix.dtype],
        matrix.data_ptr(),
        count,
        width,
        matrix.stride(0),
        bucket,
        tail_weights.data_ptr(),
        sums.data_ptr(),
    )
    return sums
