"""A tile of products to its gradient, or to probabilities, in place: one read and one write.

Floors per element: 4 bytes moved (bf16), 8 (fp32), of a softmax's gradient 4 more for that of the
probabilities; one exponential and about 12 float operations, which hide behind the move. Distance
from them: not measured.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient
from ift_kernels.backends.layout_checks import (
    check_chunk,
    check_row_gradient,
    check_rows,
    check_softmax_gradient_args,
)
from ift_kernels.backends.triton.common import (
    end_of,
    load_logits,
    logits,
    padded,
    row_gradient,
    slope,
    target_gradient,
    transform_arguments,
)
from ift_kernels.backends.triton.launch import blocks, config, launch, shape_class


@triton.jit(
    do_not_specialize=["columns", "norm_stride", "coef_stride", "offset", "column_blocks"],
    do_not_specialize_on_alignment=["target", "norm", "coef"],
)
def dlogits_kernel(
    x, bias, target, norm, coef,
    columns, stride, norm_stride, coef_stride, offset, column_blocks,
    pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // column_blocks
    start = (program % column_blocks).to(tl.int32) * BLOCK
    column = start + tl.arange(0, BLOCK)
    inside = column < end_of(columns, PADDED)
    x += row * stride
    z = load_logits(x, bias, start, column, columns, inside, pre, post, HAS_BIAS, HAS_CAP, BLOCK)
    c_target = tl.load(coef + row).to(tl.float32)
    c_prob = tl.load(coef + coef_stride + row).to(tl.float32)
    c_plogp = tl.load(coef + 2 * coef_stride + row).to(tl.float32)
    c_uniform = tl.load(coef + 3 * coef_stride + row).to(tl.float32)
    norm_0 = tl.load(norm + row).to(tl.float32)
    norm_1 = tl.load(norm + norm_stride + row).to(tl.float32)
    local = tl.load(target + row) - offset
    has_target = (local >= start) & (local < start + BLOCK) & (local < columns)
    # Of one program of a row, which reads it before it writes there.
    of_target = tl.zeros((), tl.float32)
    if has_target:
        b = 0.0
        if HAS_BIAS:
            b = tl.load(bias + local).to(tl.float32)
        of_target = target_gradient(
            logits(tl.load(x + local).to(tl.float32), b, pre, post, HAS_BIAS, HAS_CAP),
            norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform, post, plain_slope, HAS_CAP,
        )  # fmt: skip
    is_target = column == tl.where(has_target, local, -1).to(tl.int32)
    grad = row_gradient(
        z, is_target, of_target, norm_0, norm_1, c_target, c_prob, c_plogp, c_uniform, post,
        plain_slope, HAS_CAP,
    )  # fmt: skip
    grad = tl.where(column < columns, grad, 0.0)
    tl.store(x + column, grad.to(x.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["columns", "norm_stride", "column_blocks"],
    do_not_specialize_on_alignment=["norm"],
)
def probabilities_kernel(
    x, bias, norm,
    columns, stride, norm_stride, column_blocks,
    pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // column_blocks
    start = (program % column_blocks).to(tl.int32) * BLOCK
    column = start + tl.arange(0, BLOCK)
    inside = column < end_of(columns, PADDED)
    x += row * stride
    z = load_logits(x, bias, start, column, columns, inside, pre, post, HAS_BIAS, HAS_CAP, BLOCK)
    norm_0 = tl.load(norm + row).to(tl.float32)
    p = tl.exp((z - norm_0) - tl.load(norm + norm_stride + row).to(tl.float32))
    p = tl.where(column < columns, p, 0.0)
    tl.store(x + column, p.to(x.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["columns", "norm_stride", "column_blocks"],
    do_not_specialize_on_alignment=["norm", "centre"],
)
def softmax_gradient_kernel(
    x, bias, d_prob, norm, centre, prob,
    columns, stride, d_prob_stride, norm_stride, prob_stride, column_blocks,
    pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_PROB: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // column_blocks
    start = (program % column_blocks).to(tl.int32) * BLOCK
    column = start + tl.arange(0, BLOCK)
    inside = column < end_of(columns, PADDED)
    x += row * stride
    z = load_logits(x, bias, start, column, columns, inside, pre, post, HAS_BIAS, HAS_CAP, BLOCK)
    norm_0 = tl.load(norm + row).to(tl.float32)
    p = tl.exp((z - norm_0) - tl.load(norm + norm_stride + row).to(tl.float32))
    p = tl.where(column < columns, p, 0.0)
    if HAS_PROB:
        tl.store(prob + row * prob_stride + column, p.to(prob.dtype.element_ty), mask=inside)
    # Of a nearly certain token the two cancel: neither is rounded to 16 bits.
    d_prob += row * d_prob_stride
    along = tl.load(d_prob + column, mask=inside, other=0.0).to(tl.float32)
    dz = p * (along - tl.load(centre + row).to(tl.float32))
    dx = tl.where(column < columns, dz * slope(z, post, plain_slope, HAS_CAP), 0.0)
    tl.store(x + column, dx.to(x.dtype.element_ty), mask=inside)


def dlogits_(chunk: Chunk, row_gradient: RowGradient, transposed: Tensor | None = None) -> None:
    rows, columns = check_chunk(chunk)
    x, bias, transform, offset = chunk
    check_row_gradient(rows, row_gradient)
    target, norm, coef = row_gradient
    chosen, column_blocks = _blocks(x)
    launch(
        dlogits_kernel, (rows * column_blocks,), x,
        x, bias, target, norm, coef, columns, x.stride(0), norm.stride(0), coef.stride(0),
        offset, column_blocks, **transform_arguments(bias, transform), PADDED=padded(x), **chosen,
    )  # fmt: skip
    if transposed is not None:
        transposed.copy_(x.T)


def probabilities_(chunk: Chunk, norm: Tensor) -> None:
    rows, columns = check_chunk(chunk)
    x, bias, transform, _ = chunk
    check_rows("norm", norm, rows)
    chosen, column_blocks = _blocks(x)
    launch(
        probabilities_kernel, (rows * column_blocks,), x,
        x, bias, norm, columns, x.stride(0), norm.stride(0), column_blocks,
        **transform_arguments(bias, transform), PADDED=padded(x), **chosen,
    )  # fmt: skip


def softmax_gradient_(
    chunk: Chunk, d_prob: Tensor, norm: Tensor, centre: Tensor, prob: Tensor | None = None
) -> None:
    rows, columns = check_softmax_gradient_args(chunk, d_prob, norm, centre, prob)
    x, bias, transform, _ = chunk
    chosen, column_blocks = _blocks(x)
    launch(
        softmax_gradient_kernel, (rows * column_blocks,), x,
        x, bias, d_prob, norm, centre, prob, columns, x.stride(0), d_prob.stride(0),
        norm.stride(0), 0 if prob is None else prob.stride(0), column_blocks,
        **transform_arguments(bias, transform), HAS_PROB=prob is not None,
        PADDED=all(padded(t) for t in (x, d_prob, prob) if t is not None), **chosen,
    )  # fmt: skip


def _blocks(x: Tensor) -> tuple[dict[str, Any], int]:
    """Launch configuration, and how many programs share a row."""
    chosen = config("dlogits", shape_class(x.shape[1]), x.device)
    return chosen, blocks(x.shape[1], chosen["BLOCK"])
