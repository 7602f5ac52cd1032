"""Scans and the temporal residual in CUDA C++: csrc/cuda/scan.cuh, rows.cuh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends import cuda
from ift_kernels.backends.cpu import DTYPES, _address, _contiguous

__all__ = ["residual", "residual_grad", "scan"]


def scan(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float, left: bool
) -> Tensor:
    if gamma == 0.0:  # the identity, also beside NaN or infinity
        return x.clone() if mask is None else torch.where(mask, x, 0)
    x, (mask, cu_seqlens) = x.contiguous(), _contiguous(mask, cu_seqlens)
    out = torch.empty_like(x)
    rows, length = x.shape
    cuda.extension().scan(
        cuda._queue(x.device),
        DTYPES[x.dtype],
        x.data_ptr(),
        _address(mask),
        _address(cu_seqlens),
        out.data_ptr(),
        rows if cu_seqlens is None else cu_seqlens.numel() - 1,
        length,
        gamma,
        left,
    )
    return out


def residual(
    embedding: Tensor,
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lam: float,
    ignore_index: int,
) -> Tensor:
    embedding, width = embedding.contiguous(), embedding.shape[1]
    out = embedding.new_empty(*ids.shape, width)
    held, tokens = _tokens(ids, predicted, labels, cu_seqlens, ignore_index, embedding.shape[0])
    cuda.extension().residual(
        cuda._queue(out.device),
        DTYPES[out.dtype],
        embedding.data_ptr(),
        tokens,
        out.data_ptr(),
        width,
        lam,
    )
    del held  # alive until here
    return out


def residual_grad(
    grad: Tensor,
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lam: float,
    ignore_index: int,
    vocabulary: int,
) -> Tensor:
    grad, width = grad.contiguous(), grad.shape[2]
    out = grad.new_empty(vocabulary, width)
    held, tokens = _tokens(ids, predicted, labels, cu_seqlens, ignore_index, vocabulary)
    keys = torch.empty(2 * ids.numel(), dtype=torch.int64, device=grad.device)
    queue = cuda._queue(grad.device)
    cuda.extension().residual_keys(queue, tokens, keys.data_ptr())
    del held  # alive until here
    rows, order = keys.sort(stable=True)
    first = torch.searchsorted(rows, torch.arange(vocabulary + 1, device=grad.device))
    cuda.extension().sum_rows(
        queue,
        DTYPES[grad.dtype],
        grad.data_ptr(),
        cuda.extension().Parts(
            order.data_ptr(), first.data_ptr(), keys.data_ptr(), ids.numel(), vocabulary, lam
        ),
        out.data_ptr(),
        vocabulary,
        width,
    )
    return out


def _tokens(
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    vocabulary: int,
) -> tuple[tuple[Tensor | None, ...], Any]:
    """Contiguous tensors, all (R, T) but cu_seqlens, and the C++ record of their addresses."""
    tensors = _contiguous(ids, predicted, labels, cu_seqlens)
    documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    addresses = (_address(tensor) for tensor in tensors)
    record = cuda.extension().ResidualTokens(
        *addresses, documents, ids.numel(), ids.shape[1], ignore_index, vocabulary
    )
    return tensors, record
