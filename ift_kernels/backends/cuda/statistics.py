"""Running statistics of a row in CUDA C++: csrc/cuda/statistics.cuh."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import TRACK_ARGMAX, TRACK_ENTROPY
from ift_kernels.backends.cuda.extension import compiled, partials, products_of
from ift_kernels.backends.layout_checks import check_rows, check_vectors
from ift_kernels.common.transform import LogitTransform


def stats_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    state: Tensor,
    argmax: Tensor,
    track: int,
) -> None:
    check_rows(state, x.shape[0])
    check_vectors(x.shape[0], target, argmax)
    queue, products = products_of(x, bias, transform, offset)
    more = bool(track & ~(TRACK_ARGMAX | TRACK_ENTROPY))
    _memory, between = partials(queue, x, compiled().STATS_BYTES)
    compiled().stats(
        queue,
        products,
        target.data_ptr(),
        state.data_ptr(),
        state.stride(0),
        argmax.data_ptr(),
        more,
        between,
    )
