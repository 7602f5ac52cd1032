"""Columns of a tile that are apart from the rest, some in each row: taken out, and put in.

Floors: 8 bytes read for every id and tile, and for the ids in the tile a scattered read or write of
a product and one of 4 bytes. Distance from them: not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.contract import Chunk, Selected
from ift_kernels.backends.layout_checks import check_chunk, check_selected
from ift_kernels.backends.triton.launch import blocks, launch

BLOCK = 512  # ids of a program


@triton.jit(
    do_not_specialize=["columns", "offset", "k", "total", "lowest"],
    do_not_specialize_on_alignment=["ids", "values"],
)
def take_kernel(
    x, ids, values, columns, stride, offset, k, total, lowest, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(ids + place, mask=place < total, other=-1)
    local = chosen - offset
    inside = (chosen >= 0) & (local >= 0) & (local < columns)
    at = x + place // k * stride + local
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(values + place, value, mask=inside)
    tl.store(at, (tl.zeros_like(value) + lowest).to(x.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["columns", "offset", "k", "total"],
    do_not_specialize_on_alignment=["ids", "values"],
)
def put_kernel(x, ids, values, columns, stride, offset, k, total, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(ids + place, mask=place < total, other=-1)
    local = chosen - offset
    inside = (chosen >= 0) & (local >= 0) & (local < columns)
    value = tl.load(values + place, mask=inside, other=0.0)
    tl.store(x + place // k * stride + local, value.to(x.dtype.element_ty), mask=inside)


def take_selected(chunk: Chunk, selected: Selected) -> None:
    x, programs, args = _arguments(chunk, selected)
    lowest = chunk.transform.lowest_product
    launch(take_kernel, programs, x, *args, lowest, BLOCK=BLOCK, num_warps=4)


def put_selected(chunk: Chunk, selected: Selected, transposed: Tensor | None = None) -> None:
    x, programs, args = _arguments(chunk, selected)
    launch(put_kernel, programs, x, *args, BLOCK=BLOCK, num_warps=4)
    if transposed is not None:
        transposed.copy_(x.T)


def _arguments(
    chunk: Chunk, selected: Selected
) -> tuple[Tensor, tuple[int], tuple[Tensor | int, ...]]:
    """The tile, how many programs, and what both kernels take."""
    rows, columns = check_chunk(chunk)
    check_selected(rows, selected)
    x, (ids, values) = chunk.x, selected
    total, k = ids.numel(), ids.shape[1]
    args = x, ids, values, columns, x.stride(0), chunk.offset, k, total
    return x, (blocks(total, BLOCK),), args
