"""What every epilogue makes of a chunk of products first."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk


def logits(chunk: Chunk) -> Tensor:
    x = chunk.x if chunk.x.dtype == torch.float64 else chunk.x.float()
    return chunk.transform.apply(x, chunk.bias)


def target_columns(chunk: Chunk, target: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this chunk, and where (0 where not)."""
    local = target - chunk.offset
    inside = (local >= 0) & (local < chunk.x.shape[1])
    return inside, torch.where(inside, local, 0)
