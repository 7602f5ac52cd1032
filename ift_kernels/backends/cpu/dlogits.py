"""Gradients and probabilities in C++: csrc/cpu/isa/dlogits.cpp."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient
from ift_kernels.backends.cpu.extension import compiled, products_of
from ift_kernels.backends.layout_checks import (
    address,
    check_row_gradient,
    check_rows,
    check_transposed,
)


def dlogits_(chunk: Chunk, row_gradient: RowGradient, transposed: Tensor | None = None) -> None:
    x, (target, norm, coef) = chunk.x, row_gradient
    check_row_gradient(len(x), row_gradient)
    check_transposed(x, transposed)
    compiled().dlogits(
        products_of(chunk),
        target.data_ptr(),
        norm.data_ptr(),
        norm.stride(0),
        coef.data_ptr(),
        coef.stride(0),
        address(transposed),
        0 if transposed is None else transposed.stride(0),
    )


def probabilities_(chunk: Chunk, norm: Tensor) -> None:
    check_rows("norm", norm, len(chunk.x))
    compiled().probabilities(products_of(chunk), norm.data_ptr(), norm.stride(0))
