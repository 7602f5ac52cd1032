"""Gradients and probabilities in CUDA C++: csrc/cuda/dlogits.cuh."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.cuda.extension import compiled, products_of
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
    queue, products = products_of(x, bias, transform, offset)
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
        transposed.copy_(x.T)


def probabilities_(x: Tensor, bias: Tensor | None, transform: LogitTransform, norm: Tensor) -> None:
    check_rows(norm, x.shape[0])
    queue, products = products_of(x, bias, transform, 0)
    compiled().probabilities(queue, products, norm.data_ptr(), norm.stride(0))
