"""Gradients and probabilities in C++: csrc/cpu/isa/dlogits.cpp."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.cpu.extension import chunk, compiled
from ift_kernels.backends.layout_checks import check_rows, check_vectors
from ift_kernels.common.transform import LogitTransform


def dlogits_(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    norm: Tensor,
    coef: Tensor,
    transposed: Tensor | None = None,
) -> None:
    check_rows(norm, x.shape[0])
    check_rows(coef, x.shape[0])
    check_vectors(x.shape[0], target)
    if transposed is not None:
        check_rows(transposed, x.shape[0])
        if transposed.shape[0] != x.shape[1] or transposed.dtype != x.dtype:
            raise RuntimeError(f"transposed: {tuple(transposed.shape)} for {tuple(x.shape)}")
    piece = chunk(x, bias, transform, offset)
    compiled().dlogits(
        piece,
        target.data_ptr(),
        norm.data_ptr(),
        norm.stride(0),
        coef.data_ptr(),
        coef.stride(0),
        0 if transposed is None else transposed.data_ptr(),
        0 if transposed is None else transposed.stride(0),
    )


def probabilities_(x: Tensor, bias: Tensor | None, transform: LogitTransform, norm: Tensor) -> None:
    check_rows(norm, x.shape[0])
    compiled().probabilities(chunk(x, bias, transform, 0), norm.data_ptr(), norm.stride(0))
