"""The k best logits and Gumbel-max draws in CUDA C++: csrc/cuda/sampling.cuh."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends import reference
from ift_kernels.backends.cuda.extension import compiled, partials, products_of
from ift_kernels.backends.layout_checks import check_vectors
from ift_kernels.common.transform import LogitTransform


def top_k_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    offset: int,
    values: Tensor,
    ids: Tensor,
) -> None:
    if values.shape[1] > compiled().MAX_TOP_K:  # the kernel reads a row k times
        reference.top_k_update(x, bias, transform, offset, values, ids)
        return
    if not (values.shape == ids.shape and values.is_contiguous() and ids.is_contiguous()):
        raise RuntimeError("values and ids: expected contiguous (N, k)")
    if values.shape[0] != x.shape[0]:
        raise RuntimeError(f"values: {tuple(values.shape)} for {x.shape[0]} rows")
    queue, products = products_of(x, bias, transform, offset)
    compiled().top_k(queue, products, values.data_ptr(), ids.data_ptr(), values.shape[1])


def gumbel_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    offset: int,
    seed: int,
    rows: Tensor,
    best: Tensor,
    logit: Tensor,
    ids: Tensor,
) -> None:
    check_vectors(x.shape[0], rows, best, logit, ids)
    queue, products = products_of(x, bias, transform, offset)
    _memory, between = partials(queue, x, 8)
    compiled().gumbel(
        queue,
        products,
        seed % 2**64,
        rows.data_ptr(),
        best.data_ptr(),
        logit.data_ptr(),
        ids.data_ptr(),
        between,
    )
