"""What every epilogue makes of a chunk of products first."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.common.transform import LogitTransform


def logits(x: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    return transform.apply(x if x.dtype == torch.float64 else x.float(), bias)


def target_columns(target: Tensor, offset: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this chunk, and where (0 where not)."""
    local = target - offset
    inside = (local >= 0) & (local < columns)
    return inside, torch.where(inside, local, 0)
