"""The k best logits and Gumbel-max draws in C++: csrc/cpu/isa/sampling.cpp."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.cpu.extension import chunk, compiled
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
    if not (values.shape == ids.shape and values.is_contiguous() and ids.is_contiguous()):
        raise RuntimeError("values and ids: expected contiguous (N, k)")
    if values.shape[0] != x.shape[0]:
        raise RuntimeError(f"values: {tuple(values.shape)} for {x.shape[0]} rows")
    piece = chunk(x, bias, transform, offset)
    compiled().top_k(piece, values.data_ptr(), ids.data_ptr(), values.shape[1])


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
    compiled().gumbel(
        chunk(x, bias, transform, offset),
        seed % 2**64,
        rows.data_ptr(),
        best.data_ptr(),
        logit.data_ptr(),
        ids.data_ptr(),
    )
