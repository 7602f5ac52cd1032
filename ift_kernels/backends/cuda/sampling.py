"""The k best logits and Gumbel-max draws in CUDA C++: csrc/cuda/sampling.cuh."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends import reference
from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.cuda.extension import compiled, partials, products_of
from ift_kernels.backends.layout_checks import check_top_k, check_vectors


def partly_plain_torch() -> list[str]:
    return [f"top_k_update of k > {compiled().MAX_TOP_K}"]


def top_k_update(chunk: Chunk, values: Tensor, ids: Tensor) -> None:
    if values.shape[1] > compiled().MAX_TOP_K:  # the kernel reads a row k times
        reference.top_k_update(chunk, values, ids)
        return
    check_top_k(len(chunk.x), values, ids)
    queue, products = products_of(chunk)
    compiled().top_k(queue, products, values.data_ptr(), ids.data_ptr(), values.shape[1])


def gumbel_update(
    chunk: Chunk, seed: int, rows: Tensor, best: Tensor, logit: Tensor, ids: Tensor
) -> None:
    check_vectors(len(chunk.x), rows=rows, best=best, logit=logit, ids=ids)
    queue, products = products_of(chunk)
    _memory, between = partials(queue, chunk.x, 8)
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
