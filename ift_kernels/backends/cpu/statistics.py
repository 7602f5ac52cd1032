"""Running statistics of a row in C++: csrc/cpu/isa/statistics.cpp."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowState
from ift_kernels.backends.cpu.extension import compiled, products_of
from ift_kernels.backends.layout_checks import check_state


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
