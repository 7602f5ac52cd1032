"""The temporal residual and its adjoint: a gather of two rows a token, and the sums the other way.

Floors per element of the result: two rows read where a token is mixed and one where not, one
written; a multiply-add. The adjoint reads the gradient at most twice and writes the table once.
Distance: not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends import reference_scan
from ift_kernels.backends.triton.launch import blocks, config, launch, shape_class
from ift_kernels.backends.triton.segments import sum_segments


@triton.jit(do_not_specialize=["tokens", "width_blocks"])
def residual_kernel(
    embedding, ids, further, out, width, stride, width_blocks, lam, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    token = program // width_blocks
    column = (program % width_blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    own_id, other_id = tl.load(ids + token), tl.load(further + token)
    own = tl.load(embedding + own_id * stride + column, mask=inside)
    at = out + token * width + column
    if own_id == other_id:  # bit for bit: no rounding, and no second read
        tl.store(at, own, mask=inside)
    else:
        other = tl.load(embedding + other_id * stride + column, mask=inside).to(tl.float32)
        mixed = (1.0 - lam) * own.to(tl.float32) + lam * other
        tl.store(at, mixed.to(out.dtype.element_ty), mask=inside)


def residual(
    embedding: Tensor,
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lam: float,
    ignore_index: int,
) -> Tensor:
    embedding, width = embedding.contiguous(), embedding.shape[1]
    further = reference_scan.further_of(ids, predicted, labels, cu_seqlens, ignore_index)
    out = embedding.new_empty(*ids.shape, width)
    chosen = config("residual", shape_class(width), embedding.device)
    width_blocks = blocks(width, chosen["BLOCK"])
    launch(
        residual_kernel, (ids.numel() * width_blocks,), embedding,
        embedding, ids.contiguous(), further.contiguous(), out, width, embedding.stride(0),
        width_blocks, lam, **chosen,
    )  # fmt: skip
    return out


def residual_grad(
    grad: Tensor,
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lam: float,
    ignore_index: int,
    vocabulary: int,
) -> Tensor:
    width = grad.shape[2]
    further = reference_scan.further_of(ids, predicted, labels, cu_seqlens, ignore_index)
    alone = (further == ids).flatten()
    own = torch.where(alone, 1.0, 1.0 - lam)
    factor = torch.cat([own, torch.where(alone, 0.0, lam)]).float()
    out = grad.new_empty(vocabulary, width)
    flat = grad.contiguous().view(-1, width)
    at = torch.cat([ids.flatten(), further.flatten()])
    sum_segments(flat, at, factor, None, 1, out, accumulate=False)
    return out
