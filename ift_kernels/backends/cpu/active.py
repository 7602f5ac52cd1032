"""The epilogues of the active set in C++: csrc/cpu/isa/active.cpp. See reference/active.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient
from ift_kernels.backends.cpu.dlogits import dlogits_
from ift_kernels.backends.cpu.extension import compiled, products_of
from ift_kernels.backends.layout_checks import (
    DTYPES,
    check_split_active_args,
    check_tail_weights,
    check_vectors,
)
from ift_kernels.backends.reference.active import bucket_sums as reference_bucket_sums


def active_mask(chunk: Chunk, target: Tensor, level: Tensor, block: int) -> Tensor:
    products, (rows, columns), level = products_of(chunk), chunk.x.shape, level.float()
    check_vectors(rows, target=target, level=level)
    mask = chunk.x.new_empty((-(-rows // block), columns), dtype=torch.uint8)
    compiled().active_mask(products, target.data_ptr(), level.data_ptr(), block, mask.data_ptr())
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
    if row_gradient is not None:  # in place, while the tile is in cache
        dlogits_(chunk, row_gradient)
    dz = chunk.x
    check_split_active_args(dz, mask, block, bucket, tail_weights, tail_gradient, active)
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
