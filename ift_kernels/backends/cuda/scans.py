"""Discounted sums in CUDA C++: csrc/cuda/scans.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.cuda.extension import compiled, queue_of
from ift_kernels.backends.layout_checks import DTYPES, address, contiguous


def scan(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float, left: bool
) -> Tensor:
    if gamma == 0.0:  # the identity, also beside NaN or infinity
        return x.clone() if mask is None else torch.where(mask, x, 0)
    x, (mask, cu_seqlens) = x.contiguous(), contiguous(mask, cu_seqlens)
    out = torch.empty_like(x)
    rows, length = x.shape
    compiled().scan(
        queue_of(x.device),
        DTYPES[x.dtype],
        x.data_ptr(),
        address(mask),
        address(cu_seqlens),
        out.data_ptr(),
        rows if cu_seqlens is None else cu_seqlens.numel() - 1,
        length,
        gamma,
        left,
    )
    return out
