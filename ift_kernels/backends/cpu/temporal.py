"""The temporal residual and its adjoint in C++: csrc/cpu/temporal.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends.cpu.extension import compiled
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
    tokens = contiguous(ids, predicted, labels, cu_seqlens)  # alive until the call returns
    compiled().residual(
        embedding.data_ptr(),
        _residual_tokens(tokens, ids.shape, ignore_index),
        out.data_ptr(),
        width,
        lam,
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )
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
    tokens = contiguous(ids, predicted, labels, cu_seqlens)  # alive until the call returns
    compiled().residual_grad(
        grad.data_ptr(),
        _residual_tokens(tokens, ids.shape, ignore_index),
        out.data_ptr(),
        vocabulary,
        width,
        lam,
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )
    return out


def _residual_tokens(
    tokens: tuple[Tensor | None, ...], shape: torch.Size, ignore_index: int
) -> Any:
    """The C++ record of ids, predicted, labels, all of `shape` (R, T), and cu_seqlens."""
    documents = 0 if tokens[3] is None else tokens[3].numel() - 1
    addresses = (address(tensor) for tensor in tokens)
    return compiled().ResidualTokens(*addresses, documents, shape.numel(), shape[1], ignore_index)
