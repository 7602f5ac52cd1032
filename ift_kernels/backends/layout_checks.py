"""Shapes, dtypes and strides required by kernels that take raw addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient, RowState, Selected

# Codes of the dtypes that the extensions serve.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def check_rows(name: str, matrix: Tensor, columns: int | None = None) -> None:
    """A RuntimeError unless rows are of consecutive elements, as many as expected."""
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise RuntimeError(f"{name}: expected consecutive elements, strides {matrix.stride()}")
    if columns is not None and matrix.shape[1] != columns:
        raise RuntimeError(f"{name}: expected rows of {columns}, got {tuple(matrix.shape)}")


def check_vectors(length: int, **vectors: Tensor | None) -> None:
    """A RuntimeError unless all are contiguous, of this length."""
    for name, vector in vectors.items():
        if vector is not None and not (vector.shape == (length,) and vector.is_contiguous()):
            shape = tuple(vector.shape)
            raise RuntimeError(f"{name}: expected ({length},) contiguous, got {shape}")


def check_chunk(chunk: Chunk) -> tuple[int, int]:
    """Its numbers of rows and columns, once its tensors are checked."""
    rows, columns = chunk.x.shape
    check_rows("x", chunk.x)
    check_vectors(columns, bias=chunk.bias)
    return rows, columns


def check_state(rows: int, state: RowState, target: Tensor) -> None:
    check_rows("state", state.values, rows)
    check_vectors(rows, target=target, argmax=state.argmax)


def check_row_gradient(rows: int, row_gradient: RowGradient) -> None:
    check_vectors(rows, target=row_gradient.target)
    check_rows("norm", row_gradient.norm, rows)
    check_rows("coef", row_gradient.coef, rows)


def check_transposed(x: Tensor, transposed: Tensor | None) -> None:
    """A RuntimeError unless it can hold `x` transposed."""
    if transposed is None:
        return
    check_rows("transposed", transposed, len(x))
    if transposed.shape[0] != x.shape[1] or transposed.dtype != x.dtype:
        raise RuntimeError(f"transposed: {tuple(transposed.shape)} for {tuple(x.shape)}")


def check_selected(rows: int, selected: Selected) -> None:
    ids, values = selected
    contiguous = ids.is_contiguous() and values.is_contiguous()
    dtypes = ids.dtype, values.dtype
    if ids.shape != values.shape or len(ids) != rows or not contiguous:
        shapes = tuple(ids.shape), tuple(values.shape)
        raise RuntimeError(f"selected: expected contiguous (N, K) of {rows} rows, got {shapes}")
    if dtypes != (torch.int64, torch.float32):
        raise RuntimeError(f"selected: expected int64 ids and float32 values, got {dtypes}")


def check_divergence_args(
    student: Chunk, teacher: Chunk, norm: Tensor, value: Tensor | None, centre: Tensor,
    upstream: Tensor | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Rows and columns of both chunks, once all tensors of a divergence are checked."""
    rows, columns = check_chunk(student)
    check_chunk(teacher)
    if teacher.x.shape != student.x.shape:
        raise RuntimeError(f"products {tuple(student.x.shape)} and {tuple(teacher.x.shape)}")
    # Its four rows at equal distances, each of consecutive elements.
    right = norm.shape == (2, 2, rows) and norm.dtype == torch.float32
    if not right or norm.stride(0) != 2 * norm.stride(1) or (norm.stride(2) != 1 and rows > 1):
        raise RuntimeError(f"norm: {norm.dtype} {tuple(norm.shape)}, strides {norm.stride()}")
    check_vectors(rows, value=value, centre=centre, upstream=upstream)
    for sums in (value, centre):
        if sums is not None and sums.dtype != torch.float64:
            raise RuntimeError(f"expected float64 sums, got {sums.dtype}")
    return rows, columns


def check_softmax_gradient_args(
    chunk: Chunk, d_prob: Tensor, norm: Tensor, centre: Tensor, prob: Tensor | None
) -> tuple[int, int]:
    """Rows and columns of the chunk, once all tensors of a softmax gradient are checked."""
    rows, columns = check_chunk(chunk)
    check_rows("norm", norm, rows)
    check_vectors(rows, centre=centre)
    for name, tile in (("d_prob", d_prob), ("prob", prob)):
        if tile is not None:
            check_rows(name, tile, columns)
            if len(tile) != rows:
                raise RuntimeError(f"{name}: expected {rows} rows, got {tuple(tile.shape)}")
    return rows, columns


def check_top_k(rows: int, values: Tensor, ids: Tensor) -> None:
    if not (values.shape == ids.shape and values.is_contiguous() and ids.is_contiguous()):
        raise RuntimeError("values and ids: expected contiguous (N, k)")
    if values.shape[0] != rows:
        raise RuntimeError(f"values: {tuple(values.shape)} for {rows} rows")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def kernel_matrix(matrix: Tensor) -> Tensor:
    """In a dtype that kernels take, with rows of consecutive elements; a copy where it is not."""
    matrix = matrix if matrix.dtype in DTYPES else matrix.float()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def check_tail_weights(tail_weights: Tensor, columns: int) -> None:
    """A RuntimeError unless it is one float32 number per column."""
    right = tail_weights.shape == (columns,) and tail_weights.dtype == torch.float32
    if not right or not tail_weights.is_contiguous():
        shape = tuple(tail_weights.shape)
        raise RuntimeError(f"tail_weights: {tail_weights.dtype} {shape}, expected {columns}")


def mark_active_args(
    chunk: Chunk, row_gradient: RowGradient, log_threshold: float, block: int
) -> tuple[Tensor, Tensor]:
    """The level (N,) above which a logit makes its column active, and where the mask is written."""
    (rows, columns), (target, norm, _) = chunk.x.shape, row_gradient
    level = (norm.sum(0) + log_threshold).float()
    check_vectors(rows, target=target, level=level)
    return level, chunk.x.new_empty((-(-rows // block), columns), dtype=torch.uint8)


def check_take_active_args(
    dz: Tensor, mask: Tensor, block: int, bucket: int, tail_weights: Tensor, active: Tensor
) -> int:
    """The number of buckets of a `take_active`, once its tensors are checked."""
    columns, blocks, buckets = dz.shape[1], -(-len(dz) // block), -(-dz.shape[1] // bucket)
    check_tail_weights(tail_weights, columns)
    if mask.shape != (blocks, columns) or mask.stride(1) != 1 or block % 32:
        raise RuntimeError(f"mask: {tuple(mask.shape)} for {tuple(dz.shape)}, blocks of {block}")
    if active.dtype != dz.dtype or not active.is_contiguous():
        raise RuntimeError(f"active: {active.dtype}, strides {active.stride()}, for {dz.dtype}")
    return buckets


def check_tail_gradient(tail_gradient: Tensor, buckets: int, rows: int) -> None:
    """A RuntimeError unless it is float32 (buckets, rows)."""
    right = tail_gradient.shape == (buckets, rows) and tail_gradient.dtype == torch.float32
    if not right or not tail_gradient.is_contiguous():
        raise RuntimeError(
            f"tail_gradient: {tail_gradient.dtype} {tuple(tail_gradient.shape)}, strides "
            f"{tail_gradient.stride()}, expected float32 {buckets, rows}"
        )
