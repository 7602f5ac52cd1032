"""Shapes, dtypes and strides that kernels rely on which get raw addresses."""

from __future__ import annotations

import torch
from torch import Tensor

# Codes of the dtypes that the extensions serve.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def check_rows(matrix: Tensor, columns: int | None = None) -> None:
    """What raw addresses rely on: rows of consecutive elements, as many as expected."""
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise RuntimeError(f"expected rows of consecutive elements, got strides {matrix.stride()}")
    if columns is not None and matrix.shape[1] != columns:
        raise RuntimeError(f"expected rows of {columns} elements, got {matrix.shape[1]}")


def check_vectors(length: int, *vectors: Tensor | None) -> None:
    for vector in vectors:
        if vector is not None and not (vector.shape == (length,) and vector.is_contiguous()):
            raise RuntimeError(f"expected ({length},) contiguous, got {tuple(vector.shape)}")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def check_tail_weights(tail_weights: Tensor, columns: int) -> None:
    """A RuntimeError unless it is one float32 number per column."""
    right = tail_weights.shape == (columns,) and tail_weights.dtype == torch.float32
    if not right or not tail_weights.is_contiguous():
        shape = tuple(tail_weights.shape)
        raise RuntimeError(f"tail_weights: {tail_weights.dtype} {shape}, expected {columns}")


def check_split_active_args(
    dz: Tensor,
    mask: Tensor,
    block: int,
    bucket: int,
    tail_weights: Tensor,
    tail_gradient: Tensor,
    active: Tensor,
) -> tuple[int, int]:
    """Blocks and buckets of a `split_active`, once its tensors are checked."""
    (rows, columns), blocks, buckets = dz.shape, -(-len(dz) // block), -(-dz.shape[1] // bucket)
    check_tail_weights(tail_weights, columns)
    if mask.shape != (blocks, columns) or not mask.is_contiguous() or block % 32:
        raise RuntimeError(f"mask: {tuple(mask.shape)} for {tuple(dz.shape)}, blocks of {block}")
    right = tail_gradient.shape == (buckets, rows) and tail_gradient.dtype == torch.float32
    if not right or not tail_gradient.is_contiguous():
        raise RuntimeError(
            f"tail_gradient: {tail_gradient.dtype} {tuple(tail_gradient.shape)}, strides "
            f"{tail_gradient.stride()}, expected float32 {buckets, rows}"
        )
    if active.dtype != dz.dtype or not active.is_contiguous():
        raise RuntimeError(f"active: {active.dtype}, strides {active.stride()}, for {dz.dtype}")
    return blocks, buckets
