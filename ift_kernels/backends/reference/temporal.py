"""The temporal residual and its adjoint, in plain torch: the executable specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.reference.scans import _wide


def mixed_in_of(
    ids: Tensor, predicted: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int
) -> Tensor:
    """Which token is mixed in at each position, its own where none is. All (R, T) int64."""
    mixed = labels != ignore_index
    mixed[:, :1] = False
    if cu_seqlens is not None:
        # One slot more than tokens: the end of the last document is also the start of an empty one.
        first = torch.zeros(ids.numel() + 1, dtype=torch.bool, device=ids.device)
        first = first.index_fill(0, cu_seqlens, True)
        mixed = mixed & ~first[:-1].view_as(ids)
    return torch.where(mixed, predicted.roll(1, dims=1), ids)


def residual(
    embedding: Tensor,  # (V, E)
    ids: Tensor,  # (R, T) int64, as are predicted and labels
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lam: float,
    ignore_index: int,
) -> Tensor:
    """``(1 − λ)·E(ids) + λ·E(mixed_in)``, (R, T, E); E(ids) bit for bit where nothing is mixed."""
    mixed_in = mixed_in_of(ids, predicted, labels, cu_seqlens, ignore_index)
    rows, mixed_rows = embedding[ids], embedding[mixed_in]
    wide = _wide(embedding.dtype)
    mixed = ((1 - lam) * rows.to(wide) + lam * mixed_rows.to(wide)).to(embedding.dtype)
    return torch.where((mixed_in == ids)[..., None], rows, mixed)


def residual_grad(
    grad: Tensor,  # (R, T, E)
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lam: float,
    ignore_index: int,
    vocabulary: int,
) -> Tensor:
    """The adjoint of `residual`: dense (V, E), each row summed in fp32 and rounded once."""
    mixed_in = mixed_in_of(ids, predicted, labels, cu_seqlens, ignore_index)
    width = grad.shape[2]
    flat = grad.reshape(-1, width).to(_wide(grad.dtype))
    unmixed = (mixed_in == ids).reshape(-1, 1)
    parts = torch.cat([torch.where(unmixed, flat, (1 - lam) * flat), flat.mul(lam)])
    parts[len(flat) :].masked_fill_(unmixed, 0)
    # Only rows that occur are held in fp32: a (V, E) fp32 copy would dwarf the batch.
    seen, slot = torch.unique(torch.cat([ids.flatten(), mixed_in.flatten()]), return_inverse=True)
    sums = torch.zeros(len(seen), width, dtype=flat.dtype, device=grad.device)
    sums.index_add_(0, slot, parts)
    out = torch.zeros(vocabulary, width, dtype=grad.dtype, device=grad.device)
    return out.index_copy_(0, seen, sums.to(grad.dtype))
