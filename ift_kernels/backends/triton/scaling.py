"""A gradient times its upstream gradient, which is 1 where a loss itself is differentiated.

Floors: one element read where that is 1; else 4 bytes moved per element (bf16), 8 (fp32). Distance
from them: not measured. The host cannot read the factor without a stall, so every program does,
and there are only as many as fill the device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.triton.launch import blocks, launch, multiprocessors

BLOCK, PROGRAMS = 4096, 8  # elements at once; programs for each multiprocessor


@triton.jit(do_not_specialize=["elements"], do_not_specialize_on_alignment=["factor"])
def scale_kernel(x, factor, elements, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, elements, step):
            at = x + start + tl.arange(0, BLOCK)
            if start + BLOCK <= elements:
                tl.store(at, (tl.load(at).to(tl.float32) * by).to(x.dtype.element_ty))
            else:
                inside = start + tl.arange(0, BLOCK) < elements
                value = tl.load(at, mask=inside, other=0.0).to(tl.float32) * by
                tl.store(at, value.to(x.dtype.element_ty), mask=inside)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    if not gradient.is_contiguous():
        raise RuntimeError(f"gradient: expected contiguous, got strides {gradient.stride()}")
    elements, device = gradient.numel(), gradient.device
    index = device.index if device.type == "cuda" else None
    programs = min(blocks(elements, BLOCK), PROGRAMS * multiprocessors(index))
    launch(
        scale_kernel, (programs,), gradient, gradient, factor, elements, BLOCK=BLOCK, num_warps=8
    )
