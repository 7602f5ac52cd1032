"""Discounted sums in C++: csrc/cpu/scans.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.cpu.extension import compiled
from ift_kernels.backends.layout_checks import DTYPES, address, contiguous


def scan(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float, left: bool
) -> Tensor:
    x, (mask, cu_seqlens) = x.contiguous(), contiguous(mask, cu_seqlens)
    out = torch.empty_like(x)
    rows, length = x.shape
    compiled().scan(
        x.data_ptr(),
        address(mask),
        address(cu_seqlens),
        out.data_ptr(),
        rows if cu_seqlens is None else cu_seqlens.numel() - 1,
        length,
        gamma,
        left,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out
