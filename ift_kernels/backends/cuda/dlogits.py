"""Gradients and probabilities in CUDA C++: csrc/cuda/dlogits.cuh."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient
from ift_kernels.backends.cuda.extension import compiled, products_of
from ift_kernels.backends.layout_checks import check_row_gradient, check_rows


def dlogits_(chunk: Chunk, row_gradient: RowGradient, transposed: Tensor | None = None) -> None:
    check_row_gradient(len(chunk.x), row_gradient)
    target, norm, coef = row_gradient
    queue, products = products_of(chunk)
    compiled().dlogits(
        queue,
        products,
        target.data_ptr(),
        norm.data_ptr(),
        norm.stride(0),
        coef.data_ptr(),
        coef.stride(0),
    )
    if transposed is not None:
        transposed.copy_(chunk.x.T)


def probabilities_(chunk: Chunk, norm: Tensor) -> None:
    check_rows("norm", norm, len(chunk.x))
    queue, products = products_of(chunk)
    compiled().probabilities(queue, products, norm.data_ptr(), norm.stride(0))
