"""Sums of rows that belong together: each sum has one owner, so nothing is atomic.

Floors: every row that is added is read once, every sum written once; one multiply-add an element.
Distance: not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends import reference_active
from ift_kernels.backends.triton import DTYPES
from ift_kernels.backends.triton.launch import (
    blocks,
    check_rows,
    check_vectors,
    config,
    launch,
    shape_class,
)


@triton.jit(do_not_specialize=["rows", "tile"])
def segment_kernel(
    parts, order, starts, factor, common, profile, out,
    rows, width, parts_stride, tile,
    HAS_FACTOR: tl.constexpr, HAS_COMMON: tl.constexpr, ACCUMULATE: tl.constexpr,
    ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[v] (+)= common[v // tile]·profile[v] + Σ_i factor[i]·parts[order[i] % rows]``.

    The i are those of segment v.
    """
    v = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first, last = tl.load(starts + v), tl.load(starts + v + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_COMMON:
        whole = tl.load(common + v // tile * width + column, mask=inside, other=0.0)
        total += whole * tl.load(profile + v)
    lane = tl.arange(0, ITEMS)
    for start in range(first, last, ITEMS):
        item = start + lane
        there = item < last
        source = tl.load(order + item, mask=there, other=0)
        at = parts + (source % rows)[:, None] * parts_stride + column[None, :]
        value = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if HAS_FACTOR:
            share = tl.load(factor + source, mask=there, other=0.0)
            # A share of 0 is no part at all, even of a NaN.
            value = tl.where((share == 0.0)[:, None], 0.0, value * share[:, None])
        total += tl.sum(value, axis=0)
    at = out + v * width + column
    if ACCUMULATE:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


def sum_segments(
    parts: Tensor,  # (P, D)
    at: Tensor,  # (M,) which row of `out` each item adds to
    factor: Tensor | None,  # (M,) float32, or all 1; item i is row i % P of parts
    common: Tensor | None,  # (tiles, D) float32
    tile: int,
    out: Tensor,  # (rows, D)
    accumulate: bool,
    profile: Tensor | None = None,  # (rows,) float32, with `common`
) -> None:
    """Sum items into the rows of `out` in the order in which they come, in float32."""
    (rows, width), device = out.shape, out.device
    at, order = at.sort(stable=True)
    starts = torch.searchsorted(at, torch.arange(rows + 1, device=device))
    chosen = config("segments", shape_class(width), device)
    launch(
        segment_kernel, (rows, blocks(width, chosen["BLOCK"])), out,
        parts, order, starts, factor, common, profile, out,
        parts.shape[0], width, parts.stride(0), tile,
        HAS_FACTOR=factor is not None, HAS_COMMON=common is not None, ACCUMULATE=accumulate,
        **chosen,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def tile_sums_kernel(
    matrix, profile, sums, count, width, stride, tile, ITEMS: tl.constexpr, BLOCK: tl.constexpr
):
    """``sums[tile] = Σ profile[v]·matrix[v]`` over the tile's rows."""
    number = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    lane = tl.arange(0, ITEMS)
    total = tl.zeros((BLOCK,), tl.float32)
    first = number * tile
    last = tl.minimum(first + tile, count)
    for start in range(first, last, ITEMS):
        row = start + lane
        at = matrix + row[:, None] * stride + column[None, :]
        there = (row < last)[:, None] & inside[None, :]
        value = tl.load(at, mask=there, other=0.0).to(tl.float32)
        share = tl.load(profile + row, mask=row < last, other=0.0)
        total += tl.sum(value * share[:, None], axis=0)
    tl.store(sums + number * width + column, total, mask=inside)


def combine_rows(
    parts: Tensor,
    at: Tensor,
    common: Tensor,
    tile: int,
    profile: Tensor,
    out: Tensor,
    accumulate: bool,
) -> None:
    if out.dtype not in DTYPES or not out.is_contiguous():
        return reference_active.combine_rows(parts, at, common, tile, profile, out, accumulate)
    columns, width = out.shape
    check_rows("parts", parts, width)
    check_vectors(columns, profile=profile)
    if common.shape != (blocks(columns, tile), width) or not common.is_contiguous():
        raise RuntimeError(f"common: {tuple(common.shape)} for {tuple(out.shape)}")
    sum_segments(parts, at, None, common, tile, out, accumulate, profile)


def tile_sums(matrix: Tensor, tile: int, profile: Tensor) -> Tensor:
    if matrix.dtype not in DTYPES or matrix.stride(1) != 1:
        return reference_active.tile_sums(matrix, tile, profile)
    count, width = matrix.shape
    check_vectors(count, profile=profile)
    sums = torch.empty((blocks(count, tile), width), dtype=torch.float32, device=matrix.device)
    chosen = config("segments", shape_class(width), matrix.device)
    launch(
        tile_sums_kernel, (len(sums), blocks(width, chosen["BLOCK"])), matrix,
        matrix, profile, sums, count, width, matrix.stride(0), tile, **chosen,
    )  # fmt: skip
    return sums
