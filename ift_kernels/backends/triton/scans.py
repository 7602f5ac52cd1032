"""Discounted sums along rows or documents: one read, one write.

Floors per element: twice its size moved, three float operations a level of the scan. Distance: not
measured. A program walks one row (or document) in blocks and carries a sum from block to block, so
what keeps a device busy is the number of rows; a few very long ones do not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.triton.launch import config, launch, shape_class

# Powers of gamma > 0 stop at the smallest normal number instead of underflowing: a distant infinity
# then arrives as in the recurrence, and not as 0 times infinity. Of a distant finite sum at most
# 1.2e-38 of it arrives too much.
MIN_DECAY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def discounted(decay_a, sum_a, decay_b, sum_b):
    """What comes first in the direction of the scan is a."""
    return tl.maximum(decay_a * decay_b, MIN_DECAY), sum_a * decay_b + sum_b


@triton.jit
def scan_kernel(
    x, mask, cu_seqlens, out, length, gamma,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program * length
    last = first + length
    if PACKED:
        first = tl.load(cu_seqlens + program)
        last = tl.load(cu_seqlens + program + 1)
    lane = tl.arange(0, BLOCK)
    decay = tl.zeros((BLOCK,), tl.float32) + gamma
    carry = tl.zeros((), tl.float32)
    for number in range(tl.cdiv(last - first, BLOCK)):
        start = first + number * BLOCK
        if LEFT:
            start = last - (number + 1) * BLOCK
        position = start + lane
        inside = (position >= first) & (position < last)
        valid = inside
        if HAS_MASK:
            valid = inside & (tl.load(mask + position, mask=inside, other=0) != 0)
        value = tl.load(x + position, mask=valid, other=0.0).to(tl.float32)
        powers, sums = tl.associative_scan((decay, value), 0, discounted, reverse=LEFT)
        sums += carry * powers
        # The last in the direction of the scan goes on to the next block.
        end = 0 if LEFT else BLOCK - 1
        carry = tl.sum(tl.where(lane == end, sums, 0.0))
        tl.store(out + position, tl.where(valid, sums, 0.0).to(out.dtype.element_ty), mask=inside)


def scan(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float, left: bool
) -> Tensor:
    x = x.contiguous()
    if gamma == 0.0:  # the identity, also beside NaN or infinity
        return x.clone() if mask is None else torch.where(mask, x, 0)
    out = torch.empty_like(x)
    rows, length = x.shape
    programs = rows if cu_seqlens is None else cu_seqlens.numel() - 1
    flags = None if mask is None else mask.contiguous().view(torch.uint8)
    starts = None if cu_seqlens is None else cu_seqlens.contiguous()
    chosen = config("scan", shape_class(length), x.device)
    launch(
        scan_kernel, (programs,), x, x, flags, starts, out, length, max(gamma, MIN_DECAY.value),
        HAS_MASK=mask is not None, PACKED=starts is not None, LEFT=left, **chosen,
    )  # fmt: skip
    return out
