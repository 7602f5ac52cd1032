"""Discounted sums along rows or documents, in plain torch: the executable specification."""

from __future__ import annotations

import torch
from torch import Tensor


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
        rolled = y.roll(-reach if left else reach, dims=1)
        # γ^reach may underflow, and 0 · ∞ is NaN where the recurrence has ∞.
        scaled = torch.where(rolled.isfinite(), gamma**reach * rolled, rolled)
        y = y + torch.where(ahead >= reach, scaled, 0)
        reach *= 2
    if mask is not None:
        y = torch.where(mask, y, 0)
    return y.to(x.dtype)
