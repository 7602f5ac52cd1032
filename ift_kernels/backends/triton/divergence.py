"""The divergence of two heads from tiles of both heads' products, and its gradient.

Floors per column of a row: 4 bytes read (bf16) for the terms, 6 moved for the gradient; two
exponentials, of "jsd" three and a logarithm, which hide behind them. Distance from them: not
measured.

A program owns a row, or where rows are few a part of one. Parts have sums of their own, which are
added in order of the columns.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.contract import KINDS, Chunk
from ift_kernels.backends.layout_checks import check_divergence_args
from ift_kernels.backends.triton.common import (
    end_of,
    load_logits,
    padded,
    slope,
    transform_arguments,
)
from ift_kernels.backends.triton.launch import blocks, config, launch, shape_class
from ift_kernels.backends.triton.statistics import parts_of

FORWARD, REVERSE, JSD = (tl.constexpr(KINDS.index(kind)) for kind in ("forward", "reverse", "jsd"))


@triton.jit
def times(p, x):
    """p·x with 0 where p is 0, whatever x: both heads may rule out a token with −∞."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def log_probs(z, inside, norm, norm_stride):
    """Of the logits of a row, −∞ outside; `norm`: its maximum and the log of its sum."""
    log_p = (z - tl.load(norm).to(tl.float32)) - tl.load(norm + norm_stride).to(tl.float32)
    return tl.where(inside, log_p, float("-inf"))


@triton.jit
def load_both(
    x, y, bias, teacher_bias, norm, norm_stride, start, column, columns, end,
    pre, post, teacher_pre, teacher_post,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The student's logits, and the log-probabilities of both, of the columns from `start` on."""
    inside, readable = column < columns, column < end
    z = load_logits(x, bias, start, column, columns, readable, pre, post, HAS_BIAS, HAS_CAP, BLOCK)
    y_z = load_logits(
        y, teacher_bias, start, column, columns, readable, teacher_pre, teacher_post,
        TEACHER_BIAS, TEACHER_CAP, BLOCK,
    )  # fmt: skip
    s = log_probs(z, inside, norm, norm_stride)
    return z, s, log_probs(y_z, inside, norm + 2 * norm_stride, norm_stride)


@triton.jit
def over_mixture(s, t, beta):
    """s − log m and t − log m with m = (1 − β)eˢ + βeᵗ, relative to the larger of s and t."""
    d = t - s
    student_larger = d <= 0.0
    e = tl.exp(-tl.abs(d))
    mix = tl.where(student_larger, (1.0 - beta) + beta * e, beta + (1.0 - beta) * e)
    log_mix = tl.log(mix)
    return tl.where(student_larger, 0.0, -d) - log_mix, tl.where(student_larger, d, 0.0) - log_mix


@triton.jit(
    do_not_specialize=["columns", "norm_stride", "part_stride", "parts", "length"],
    do_not_specialize_on_alignment=["norm", "value", "centre"],
)
def divergence_terms_kernel(
    x, y, bias, teacher_bias, norm, value, centre,
    columns, stride, teacher_stride, norm_stride, part_stride, parts, length, beta,
    pre, post, plain_slope, teacher_pre, teacher_post,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_CAP: tl.constexpr,
    KIND: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    x += row * stride
    y += row * teacher_stride
    norm += row
    lane = tl.arange(0, BLOCK)
    own = tl.zeros((BLOCK,), tl.float32)
    of_teacher = tl.zeros((BLOCK,), tl.float32)
    first = part.to(tl.int32) * length * BLOCK
    last = tl.minimum(first + length * BLOCK, columns)
    end = end_of(columns, PADDED)
    for start in range(first, last, BLOCK):
        column = start + lane
        _, s, t = load_both(
            x, y, bias, teacher_bias, norm, norm_stride, start, column, columns, end,
            pre, post, teacher_pre, teacher_post,
            HAS_BIAS, HAS_CAP, TEACHER_BIAS, TEACHER_CAP, BLOCK,
        )  # fmt: skip
        if KIND == FORWARD:
            own += times(tl.exp(t), t - s)
        elif KIND == REVERSE:
            own += times(tl.exp(s), s - t)
        else:
            s_over, t_over = over_mixture(s, t, beta)
            own += times(tl.exp(s), s_over)
            of_teacher += times(tl.exp(t), t_over)
    value += part * part_stride + row
    total = tl.sum(own.to(tl.float64))
    if KIND != FORWARD:
        centre += part * part_stride + row
        tl.store(centre, tl.load(centre) + total)
    if KIND == JSD:
        total = (1.0 - beta) * total + beta * tl.sum(of_teacher.to(tl.float64))
    tl.store(value, tl.load(value) + total)


@triton.jit(
    do_not_specialize=["columns", "norm_stride", "part_stride", "parts", "length"],
    do_not_specialize_on_alignment=["norm", "value", "centre", "upstream"],
)
def divergence_gradient_kernel(
    x, y, bias, teacher_bias, norm, value, centre, upstream,
    columns, stride, teacher_stride, norm_stride, part_stride, parts, length, beta,
    pre, post, plain_slope, teacher_pre, teacher_post,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_CAP: tl.constexpr,
    KIND: tl.constexpr, HAS_VALUE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    x += row * stride
    y += row * teacher_stride
    norm += row
    d_value = tl.load(upstream + row).to(tl.float32)
    mean = tl.load(centre + row).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    first = part.to(tl.int32) * length * BLOCK
    last = tl.minimum(first + length * BLOCK, columns)
    end = end_of(columns, PADDED)
    for start in range(first, last, BLOCK):
        column = start + lane
        z, s, t = load_both(
            x, y, bias, teacher_bias, norm, norm_stride, start, column, columns, end,
            pre, post, teacher_pre, teacher_post,
            HAS_BIAS, HAS_CAP, TEACHER_BIAS, TEACHER_CAP, BLOCK,
        )  # fmt: skip
        p = tl.exp(s)
        if KIND == FORWARD:
            q = tl.exp(t)
            dz = p - q
            if HAS_VALUE:
                total += times(q, t - s)
        elif KIND == REVERSE:
            dz = times(p, s - t - mean)
        else:
            s_over, _ = over_mixture(s, t, beta)
            dz = times((1.0 - beta) * p, s_over - mean)
        dx = dz * d_value * slope(z, post, plain_slope, HAS_CAP)
        # Nothing comes from a row without upstream gradient, even where it holds a NaN.
        dx = tl.where(column < columns, tl.where(d_value == 0.0, 0.0, dx), 0.0)
        tl.store(x + column, dx.to(x.dtype.element_ty), mask=column < end)
    if HAS_VALUE:
        value += part * part_stride + row
        tl.store(value, tl.load(value) + tl.sum(total.to(tl.float64)))


def divergence_terms(
    student: Chunk,
    teacher: Chunk,
    kind: str,
    beta: float,
    norm: Tensor,
    value: Tensor,
    centre: Tensor,
) -> None:
    rows, columns = check_divergence_args(student, teacher, norm, value, centre)
    x, y = student.x, teacher.x
    chosen, parts, length = _parts(x)
    sums = value.new_zeros(2, parts, rows) if parts > 1 else None
    to_value, to_centre = (value, centre) if sums is None else sums
    launch(
        divergence_terms_kernel, (rows * parts,), x,
        x, y, student.bias, teacher.bias, norm, to_value, to_centre, columns,
        x.stride(0), y.stride(0), norm.stride(1), rows, parts, length, beta,
        **_of_both(student, teacher), KIND=KINDS.index(kind), **chosen,
    )  # fmt: skip
    if sums is not None:
        value += sums[0].sum(0)
        centre += sums[1].sum(0)


def divergence_gradient_(
    student: Chunk,
    teacher: Chunk,
    kind: str,
    beta: float,
    norm: Tensor,
    centre: Tensor,
    upstream: Tensor,
    value: Tensor | None = None,
) -> None:
    upstream = upstream.contiguous()
    rows, columns = check_divergence_args(student, teacher, norm, value, centre, upstream)
    if value is not None and kind != "forward":
        raise RuntimeError(f"value: only of kind 'forward', got {kind!r}")
    x, y = student.x, teacher.x
    chosen, parts, length = _parts(x)
    sums = value.new_zeros(parts, rows) if value is not None and parts > 1 else None
    launch(
        divergence_gradient_kernel, (rows * parts,), x,
        x, y, student.bias, teacher.bias, norm, value if sums is None else sums, centre, upstream,
        columns, x.stride(0), y.stride(0), norm.stride(1), rows, parts, length, beta,
        **_of_both(student, teacher), KIND=KINDS.index(kind), HAS_VALUE=value is not None,
        **chosen,
    )  # fmt: skip
    if value is not None and sums is not None:
        value += sums.sum(0)


def _parts(x: Tensor) -> tuple[dict[str, int], int, int]:
    """Launch configuration, in how many parts a row is cut, and blocks of a part."""
    chosen = config("divergence", shape_class(x.shape[1]), x.device)
    rows, columns = x.shape
    parts = parts_of(rows, columns, chosen["BLOCK"], x.device)
    return chosen, parts, blocks(blocks(columns, parts), chosen["BLOCK"])


def _of_both(student: Chunk, teacher: Chunk) -> dict[str, Any]:
    """The arguments of a kernel that depend on both sides: transforms, biases, padding."""
    other = transform_arguments(teacher.bias, teacher.transform)
    return {
        **transform_arguments(student.bias, student.transform),
        "teacher_pre": other["pre"],
        "teacher_post": other["post"],
        "TEACHER_BIAS": other["HAS_BIAS"],
        "TEACHER_CAP": other["HAS_CAP"],
        "PADDED": padded(student.x) and padded(teacher.x),
    }
