"""The epilogues of the active set in CUDA C++: csrc/cuda/active.cuh. See reference/active.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient
from ift_kernels.backends.cuda.dlogits import dlogits_
from ift_kernels.backends.cuda.extension import compiled, products_of, queue_of
from ift_kernels.backends.layout_checks import (
    DTYPES,
    check_split_active_args,
    check_tail_weights,
    check_vectors,
    kernel_matrix,
)


def active_mask(chunk: Chunk, target: Tensor, level: Tensor, block: int) -> Tensor:
    (rows, columns), level = chunk.x.shape, level.float()
    check_vectors(rows, target=target, level=level)
    mask = chunk.x.new_empty((-(-rows // block), columns), dtype=torch.uint8)
    queue, products = products_of(chunk)
    compiled().active_mask(
        queue, products, target.data_ptr(), level.data_ptr(), block, mask.data_ptr()
    )
    return mask


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
    if row_gradient is not None:
        dlogits_(chunk, row_gradient)
    dz = chunk.x
    blocks, buckets = check_split_active_args(
        dz, mask, block, bucket, tail_weights, tail_gradient, active
    )
    queue, gradients = products_of(Chunk(dz))
    counts = torch.empty((blocks, buckets), dtype=torch.int64, device=dz.device)
    compiled().mask_counts(queue, mask.data_ptr(), blocks, dz.shape[1], bucket, counts.data_ptr())
    ends = counts.cumsum(1)
    elements = (ends[:, -1] + 31) // 32 * 32 * block
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
