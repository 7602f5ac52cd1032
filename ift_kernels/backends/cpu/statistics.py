"""Running statistics of a row in C++: csrc/cpu/isa/statistics.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowState
from ift_kernels.backends.cpu.extension import compiled, products_of
from ift_kernels.backends.layout_checks import check_state, check_vectors


def stats_update(chunk: Chunk, target: Tensor, state: RowState, track: int) -> None:
    check_state(len(chunk.x), state, target)
    values, argmax = state
    compiled().stats(
        products_of(chunk),
        target.data_ptr(),
        values.data_ptr(),
        values.stride(0),
        argmax.data_ptr(),
        track,
    )


def exponentials_(
    chunk: Chunk, target: Tensor, state: RowState, centre: Tensor, total: Tensor | None
) -> None:
    """Overwrite products with ``exp(z − centre)``, 0 for the target, and update the statistics.

    `centre` (N,), float32, −inf at first, is about the largest logit so far but for the target's:
    where it rises, rows of `total` (N, D), a sum relative to it, are rescaled. Of float32 products,
    without softcap, of positive scale.
    """
    rows, transform = len(chunk.x), chunk.transform
    check_state(rows, state, target)
    check_vectors(rows, centre=centre)
    sums = centre.new_empty((rows, 0)) if total is None else total
    if {chunk.x.dtype, centre.dtype, sums.dtype} != {torch.float32}:
        raise RuntimeError(f"expected float32, got {chunk.x.dtype}, {centre.dtype}, {sums.dtype}")
    if len(sums) != rows or not sums.is_contiguous():
        raise RuntimeError(f"total: {tuple(sums.shape)}, strides {sums.stride()}, of {rows} rows")
    if transform.softcap or transform.scale <= 0:
        raise RuntimeError(f"transform: expected a positive scale, no softcap; got {transform}")
    values = state.values
    compiled().exponentials(
        products_of(chunk),
        target.data_ptr(),
        values.data_ptr(),
        values.stride(0),
        centre.data_ptr(),
        sums.data_ptr(),
        sums.shape[1],
    )
