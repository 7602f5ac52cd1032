"""The epilogues of the active set in CUDA C++: csrc/cuda/active*.cuh. See reference_active.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends import cuda, reference_active
from ift_kernels.backends.cpu import DTYPES, vectors
from ift_kernels.backends.cpu_active import check_profile, collected, stored, taken_apart
from ift_kernels.transform import LogitTransform

__all__ = [
    "active_collect",
    "active_gradient_",
    "active_marks",
    "active_rows",
    "combine_rows",
    "tile_sums",
]


def active_marks(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    level: Tensor,
    block: int,
) -> Tensor:
    level = level.float()
    vectors(x.shape[0], target, level)
    shape = -(-x.shape[0] // block), x.shape[1]
    marks = torch.empty(shape, dtype=torch.uint8, device=x.device)
    queue, products = cuda._products(x, bias, transform, offset)
    cuda.extension().active_marks(
        queue, products, target.data_ptr(), level.data_ptr(), block, marks.data_ptr()
    )
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
    reference = reference.float()
    blocks, tiles, block = collected(x, marks, reference, tile, store, sums)
    queue, products = cuda._products(x, bias, transform, 0)
    counts = torch.empty(blocks * tiles, dtype=torch.int64, device=x.device)
    cuda.extension().mark_counts(
        queue, marks.data_ptr(), blocks, x.shape[1], tile, counts.data_ptr()
    )
    starts = counts.cumsum(0) - counts
    out = sums.contiguous()
    cuda.extension().active_collect(
        queue,
        products,
        marks.data_ptr(),
        starts.data_ptr(),
        reference.data_ptr(),
        block,
        tile,
        store.data_ptr(),
        out.data_ptr(),
    )
    if out is not sums:
        sums.copy_(out)


def active_gradient_(
    store: Tensor,
    pairs: Tensor,
    rows: int,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    norm: Tensor,
    coef: Tensor,
    base: Tensor,
    tile: int,
    profile: Tensor,
    row_major: Tensor | None = None,
) -> None:
    block = stored(store, pairs, rows, bias, target, norm, coef, base, profile)
    if not store.is_contiguous() or store.data_ptr() % 16:
        raise RuntimeError("store: expected contiguous, on a multiple of 16 bytes")
    if row_major is not None:
        raise RuntimeError("row_major: products take the store as it is, see wants_transpose")
    products = cuda.extension().Products(
        store.data_ptr(),
        DTYPES[store.dtype],
        rows,
        base.shape[0] * tile,  # every id of the chunk lies below
        block,
        0 if bias is None else bias.data_ptr(),
        transform.scale,
        transform.softcap,
        transform.temperature,
        offset,
    )
    cuda.extension().active_gradient(
        cuda._queue(store.device),
        products,
        target.data_ptr(),
        norm.data_ptr(),
        norm.stride(0),
        coef.data_ptr(),
        coef.stride(0),
        base.data_ptr(),
        base.stride(0),
        profile.data_ptr(),
        pairs.data_ptr(),
        store.shape[0],
        block,
        tile,
    )


def active_rows(
    dz: Tensor,
    marks: Tensor,
    block: int,
    tile: int,
    profile: Tensor,
    mean: Tensor,
    active: Tensor,
) -> None:
    blocks, tiles = taken_apart(dz, marks, block, tile, profile, mean, active)
    queue, gradients = cuda._products(dz, None, LogitTransform(), 0)
    counts = torch.empty((blocks, tiles), dtype=torch.int64, device=dz.device)
    cuda.extension().mark_counts(
        queue, marks.data_ptr(), blocks, dz.shape[1], tile, counts.data_ptr()
    )
    ends = counts.cumsum(1)
    elements = (ends[:, -1] + 31) // 32 * 32 * block
    starts = elements.cumsum(0) - elements
    cuda.extension().active_rows(
        queue,
        gradients,
        marks.data_ptr(),
        ends.data_ptr(),
        starts.data_ptr(),
        block,
        tile,
        profile.data_ptr(),
        mean.data_ptr(),
        active.data_ptr(),
    )


def combine_rows(
    parts: Tensor,
    at: Tensor,
    common: Tensor,
    tile: int,
    profile: Tensor,
    out: Tensor,
    accumulate: bool,
) -> None:
    if out.dtype not in DTYPES:
        reference_active.combine_rows(parts, at, common, tile, profile, out, accumulate)
        return
    columns, width = out.shape
    vectors(parts.shape[0], at)
    check_profile(profile, columns)
    if not (parts.is_contiguous() and common.is_contiguous()) or common.dtype != torch.float32:
        raise RuntimeError("parts, common: expected contiguous, common in float32")
    if parts.shape[1] != width or common.shape != (-(-columns // tile), width):
        raise RuntimeError(f"common: {tuple(common.shape)} for {tuple(out.shape)}")
    if not out.is_contiguous():
        raise RuntimeError(f"out: expected contiguous, got strides {out.stride()}")
    order, first = sorted_by_row(at, columns)
    cuda.extension().sum_rows(
        cuda._queue(out.device),
        DTYPES[parts.dtype],
        parts.data_ptr(),
        cuda.extension().Parts(order.data_ptr(), first.data_ptr(), 0, 0, 0, 0.0),
        common.data_ptr(),
        profile.data_ptr(),
        DTYPES[out.dtype],
        out.data_ptr(),
        columns,
        width,
        tile,
        accumulate,
    )


def sorted_by_row(at: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The order that sorts `at`, stable, and where each of `rows` begins in it, (rows + 1,)."""
    values, order = at.sort(stable=True)
    numbers = torch.arange(rows + 1, device=at.device)
    return order, torch.searchsorted(values, numbers)


def tile_sums(matrix: Tensor, tile: int, profile: Tensor) -> Tensor:
    if matrix.dtype not in DTYPES or matrix.stride(1) != 1:
        return reference_active.tile_sums(matrix, tile, profile)
    count, width = matrix.shape
    check_profile(profile, count)
    sums = torch.empty((-(-count // tile), width), dtype=torch.float32, device=matrix.device)
    cuda.extension().tile_sums(
        cuda._queue(matrix.device),
        DTYPES[matrix.dtype],
        matrix.data_ptr(),
        count,
        width,
        matrix.stride(0),
        tile,
        profile.data_ptr(),
        sums.data_ptr(),
    )
    return sums
