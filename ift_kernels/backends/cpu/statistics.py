"""Running statistics of a row in C++: csrc/cpu/isa/statistics.cpp."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.cpu.extension import chunk, compiled
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
    piece = chunk(x, bias, transform, offset)
    compiled().stats(
        piece, target.data_ptr(), state.data_ptr(), state.stride(0), argmax.data_ptr(), track
    )
