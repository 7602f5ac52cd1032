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

from ift_kernels.backends.reference.temporal import mixed_in_of
from ift_kernels.backends.triton.launch import blocks, config, launch, shape_class


@triton.jit(do_not_specialize=["tokens", "width_blocks"])
def residual_kernel(
    embedding, ids, mixed_in, out, width, stride, width_blocks, lam, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    token = program // width_blocks
    column = (program % width_blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    token_id, mixed_in_id = tl.load(ids + token), tl.load(mixed_in + token)
    token_row = tl.load(embedding + token_id * stride + column, mask=inside)
    pointer = out + token * width + column
    if token_id == mixed_in_id:  # bit for bit: no rounding, and no second read
        tl.store(pointer, token_row, mask=inside)
    else:
        mixed_row = tl.load(embedding + mixed_in_id * stride + column, mask=inside)
        mixed = (1.0 - lam) * token_row.to(tl.float32) + lam * mixed_row.to(tl.float32)
        tl.store(pointer, mixed.to(out.dtype.element_ty), mask=inside)


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
    mixed_in = mixed_in_of(ids, predicted, labels, cu_seqlens, ignore_index)
    out = embedding.new_empty(*ids.shape, width)
    chosen = config("residual", shape_class(width), embedding.device)
    width_blocks = blocks(width, chosen["BLOCK"])
    launch(
        residual_kernel, (ids.numel() * width_blocks,), embedding,
        embedding, ids.contiguous(), mixed_in.contiguous(), out, width, embedding.stride(0),
        width_blocks, lam, **chosen,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def segment_kernel(
    parts, order, starts, factor, out, rows, width, parts_stride,
    ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[v] = Σ_i factor[i]·parts[order[i] % rows]`` over the items i of segment v.

    One program owns each sum: nothing is atomic.
    """
    v = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first, last = tl.load(starts + v), tl.load(starts + v + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    lane = tl.arange(0, ITEMS)
    for start in range(first, last, ITEMS):
        item = start + lane
        valid = item < last
        source = tl.load(order + item, mask=valid, other=0)
        pointer = parts + (source % rows)[:, None] * parts_stride + column[None, :]
        value = tl.load(pointer, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        share = tl.load(factor + source, mask=valid, other=0.0)
        # A share of 0 is no part at all, even of a NaN.
        value = tl.where((share == 0.0)[:, None], 0.0, value * share[:, None])
        total += tl.sum(value, axis=0)
    pointer = out + v * width + column
    tl.store(pointer, total.to(out.dtype.element_ty), mask=inside)


def sum_segments(
    parts: Tensor,  # (P, D)
    out_row: Tensor,  # (M,) which row of `out` each item adds to
    factor: Tensor,  # (M,) float32; item i is row i % P of parts
    out: Tensor,  # (rows, D)
) -> None:
    """Sum items into the rows of `out` in the order in which they come, in float32."""
    (rows, width), device = out.shape, out.device
    out_row, order = out_row.sort(stable=True)
    starts = torch.searchsorted(out_row, torch.arange(rows + 1, device=device))
    chosen = config("segments", shape_class(width), device)
    launch(
        segment_kernel, (rows, blocks(width, chosen["BLOCK"])), out,
        parts, order, starts, factor, out, parts.shape[0], width, parts.stride(0), **chosen,
    )  # fmt: skip


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
    mixed_in = mixed_in_of(ids, predicted, labels, cu_seqlens, ignore_index)
    unmixed = (mixed_in == ids).flatten()
    token_share = torch.where(unmixed, 1.0, 1.0 - lam)
    factor = torch.cat([token_share, torch.where(unmixed, 0.0, lam)]).float()
    out = grad.new_empty(vocabulary, width)
    flat = grad.contiguous().view(-1, width)
    out_row = torch.cat([ids.flatten(), mixed_in.flatten()])
    sum_segments(flat, out_row, factor, out)
    return out
