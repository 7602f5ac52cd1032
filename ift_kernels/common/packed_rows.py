"""Rows of a batch in either layout: padded (B, T), or documents packed behind one another.

Sequence losses are sums per row; with this the same few lines serve both layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.common import checks


class Rows:
    """Per-row reductions of per-token values.

    Args:
        like: per-token tensor, (B, T); or (T,), one row.
        cu_seqlens: (documents + 1,) int32 or int64; when given, the rows are the documents
            ``[cu[i], cu[i+1])`` of the flattened tokens, whatever the shape of `like`. Documents
            may be empty.

    Raises:
        TypeError, ValueError: `cu_seqlens` is not an integer vector that runs from 0 to the number
            of tokens without decreasing.
    """

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None = None) -> None:
        self.shape = like.shape
        self.document: Tensor | None = None  # (tokens,) the row of each token, when packed
        if cu_seqlens is None:
            self.padded = (1, *like.shape)[-2:]
            self.count = self.padded[0]
        else:
            cu = checks.seqlens(cu_seqlens, like)
            self.count = cu.numel() - 1
            token = torch.arange(like.numel(), device=like.device)
            self.document = torch.searchsorted(cu, token, right=True) - 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each row, (rows,) in the dtype of `x`, accumulated in fp64 where that exists."""
        wide = x.dtype if x.device.type == "mps" else torch.float64
        if self.document is None:
            return x.reshape(self.padded).sum(1, dtype=wide).to(x.dtype)
        total = torch.zeros(self.count, dtype=wide, device=x.device)
        return total.index_add(0, self.document, x.flatten().to(wide)).to(x.dtype)

    def amax(self, x: Tensor) -> Tensor:
        """Maximum over each row, (rows,); −inf for an empty one. Not differentiable."""
        x = x.detach()
        if self.document is None:
            return x.reshape(self.padded).amax(1)
        lowest = torch.full((self.count,), -torch.inf, dtype=x.dtype, device=x.device)
        return lowest.scatter_reduce(0, self.document, x.flatten(), "amax")

    def spread(self, value: Tensor) -> Tensor:
        """The row's `value` (rows,) at each of its tokens, in the shape of the batch."""
        if self.document is not None:
            return value[self.document].reshape(self.shape)
        return value[:, None].expand(self.padded).reshape(self.shape)
