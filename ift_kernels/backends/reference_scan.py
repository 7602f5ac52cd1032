"""The scan and the residual in plain torch: the specification of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["residual", "residual_grad", "scan"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scan(
    x: Tensor,  # (R, T)
    mask: Tensor | None,  # (R, T) bool
    cu_seqlens: Tensor | None,  # (documents + 1,) int64; then R = 1
    gamma: float,
    left: bool,
) -> Tensor:
    """``mask ⊙ U(mask ⊙ x)`` with ``(U x)[t] = Σ_{j ≥ t} γ^(j−t) x[j]``; Uᵀ when not `left`.

    Doubling: after step i every position holds its discounted sum over the next 2^i positions, so
    log2(T) vector operations do the work of T sequential ones.
    """
    if mask is not None:
        x = torch.where(mask, x, 0)
    y = x.to(_wide(x.dtype))
    length = x.shape[1]
    position = torch.arange(length, device=x.device)
    if cu_seqlens is None:
        start, end = torch.zeros_like(position), torch.full_like(position, length)
    else:
        document = torch.searchsorted(cu_seqlens, position, right=True)
        start, end = cu_seqlens[document - 1], cu_seqlens[document]
    ahead = end - 1 - position if left else position - start  # how many positions a sum may reach
    reach = 1
    while reach < length and gamma != 0.0:  # 0 is the identity, also beside NaN or infinity
        # The wrapped-around part of the roll is outside every document, as is a neighbour's.
        further = y.roll(-reach if left else reach, dims=1)
        # γ^reach may underflow, and 0 · ∞ is NaN where the recurrence has ∞.
        scaled = torch.where(further.isfinite(), gamma**reach * further, further)
        y = y + torch.where(ahead >= reach, scaled, 0)
        reach *= 2
    if mask is not None:
        y = torch.where(mask, y, 0)
    return y.to(x.dtype)


def further_of(
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
    """``(1 − λ)·E(ids) + λ·E(further)``, (R, T, E); E(ids) bit for bit where nothing is mixed."""
    further = further_of(ids, predicted, labels, cu_seqlens, ignore_index)
    own, other = embedding[ids], embedding[further]
    wide = _wide(embedding.dtype)
    mixed = ((1 - lam) * own.to(wide) + lam * other.to(wide)).to(embedding.dtype)
    return torch.where((further == ids)[..., None], own, mixed)


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
    further = further_of(ids, predicted, labels, cu_seqlens, ignore_index)
    width = grad.shape[2]
    flat = grad.reshape(-1, width).to(_wide(grad.dtype))
    alone = (further == ids).reshape(-1, 1)
    parts = torch.cat([torch.where(alone, flat, (1 - lam) * flat), flat.mul(lam)])
    parts[len(flat) :].masked_fill_(alone, 0)
    # Only rows that occur are held in fp32: a (V, E) fp32 copy would dwarf the batch.
    seen, slot = torch.unique(torch.cat([ids.flatten(), further.flatten()]), return_inverse=True)
    sums = torch.zeros(len(seen), width, dtype=flat.dtype, device=grad.device)
    sums.index_add_(0, slot, parts)
    out = torch.zeros(vocabulary, width, dtype=grad.dtype, device=grad.device)
    return out.index_copy_(0, seen, sums.to(grad.dtype))
