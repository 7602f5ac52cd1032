"""The k best logits and Gumbel-max draws in C++: csrc/cpu/isa/sampling.cpp."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.cpu.extension import compiled, products_of
from ift_kernels.backends.layout_checks import check_top_k, check_vectors


def top_k_update(chunk: Chunk, values: Tensor, ids: Tensor) -> None:
    check_top_k(len(chunk.x), values, ids)
    compiled().top_k(products_of(chunk), values.data_ptr(), ids.data_ptr(), values.shape[1])


def gumbel_update(
    chunk: Chunk, seed: int, rows: Tensor, best: Tensor, logit: Tensor, ids: Tensor
) -> None:
    check_vectors(len(chunk.x), rows=rows, best=best, logit=logit, ids=ids)
    compiled().gumbel(
        products_of(chunk),
        seed % 2**64,
        rows.data_ptr(),
        best.data_ptr(),
        logit.data_ptr(),
        ids.data_ptr(),
    )
