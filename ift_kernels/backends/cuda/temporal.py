"""The temporal residual and its adjoint in CUDA C++: csrc/cuda/temporal.cuh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends.cuda.extension import compiled, queue_of
from ift_kernels.backends.layout_checks import DTYPES, address, contiguous


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
    alive, tokens = _tokens(ids, predicted, labels, cu_seqlens, ignore_index, embedding.shape[0])
    compiled().residual(
        queue_of(out.device),
        DTYPES[out.dtype],
        embedding.data_ptr(),
        tokens,
        out.data_ptr(),
        width,
        lam,
    )
    del alive  # until the kernels are queued
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
    alive, tokens = _tokens(ids, predicted, labels, cu_seqlens, ignore_index, vocabulary)
    keys = torch.empty(2 * ids.numel(), dtype=torch.int64, device=grad.device)
    queue = queue_of(grad.device)
    compiled().residual_keys(queue, tokens, keys.data_ptr())
    del alive  # until the kernels are queued
    rows, order = keys.sort(stable=True)
    first = torch.searchsorted(rows, torch.arange(vocabulary + 1, device=grad.device))
    compiled().sum_rows(
        queue,
        DTYPES[grad.dtype],
        grad.data_ptr(),
        compiled().Parts(
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
    tensors = contiguous(ids, predicted, labels, cu_seqlens)
    documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    addresses = (address(tensor) for tensor in tensors)
    record = compiled().ResidualTokens(
        *addresses, documents, ids.numel(), ids.shape[1], ignore_index, vocabulary
    )
    return tensors, record
