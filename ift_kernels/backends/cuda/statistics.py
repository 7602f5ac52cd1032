"""Running statistics of a row in CUDA C++: csrc/cuda/statistics.cuh."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import TRACK_ARGMAX, TRACK_ENTROPY, Chunk, RowState
from ift_kernels.backends.cuda.extension import compiled, partials, products_of
from ift_kernels.backends.layout_checks import check_state


def stats_update(chunk: Chunk, target: Tensor, state: RowState, track: int) -> None:
    check_state(len(chunk.x), state, target)
    queue, products = products_of(chunk)
    more = bool(track & ~(TRACK_ARGMAX | TRACK_ENTROPY))
    _memory, between = partials(queue, chunk.x, compiled().STATS_BYTES)
    compiled().stats(
        queue,
        products,
        target.data_ptr(),
        state.values.data_ptr(),
        state.values.stride(0),
        state.argmax.data_ptr(),
        more,
        between,
    )
