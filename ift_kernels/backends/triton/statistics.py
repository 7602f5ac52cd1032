"""A tile of products to running row statistics: one read.

Floors per element: 2 bytes read (bf16), 4 (fp32); about 10 float operations and one exponential,
which at 4 exponentials a cycle and quarter of a multiprocessor hide behind the read. Distance from
them: not measured.

A program owns a row, or where rows are few a part of one; parts go to states of their own, which a
second kernel merges in order of the columns, so that results do not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.contract import TRACK_ARGMAX, Chunk, RowState, new_state
from ift_kernels.backends.layout_checks import check_chunk, check_state
from ift_kernels.backends.triton.common import (
    end_of,
    exp_difference,
    load_logits,
    logits,
    merge_into,
    padded,
    transform_arguments,
)
from ift_kernels.backends.triton.launch import blocks, config, launch, multiprocessors, shape_class

NO_COLUMN = tl.constexpr(2**31 - 1)  # larger than any
MAX_PARTS = 64


@triton.jit(
    do_not_specialize=["columns", "state_stride", "part_stride", "argmax_stride", "offset",
                       "parts", "length"],
    do_not_specialize_on_alignment=["target", "state", "argmax"],
)  # fmt: skip
def stats_kernel(
    x, bias, target, state, argmax,
    columns, stride, state_stride, part_stride, argmax_stride, offset, parts, length,
    pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TRACK: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    state += part * part_stride + row
    argmax += part * argmax_stride + row
    x += row * stride
    lane = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("-inf"), tl.float32)
    zero = tl.zeros((BLOCK,), tl.float32)
    best, second = low, low
    best_id = tl.full((BLOCK,), NO_COLUMN, tl.int32)
    total, e_z, e_sq, z_sum = zero, zero, zero, zero
    top = tl.max(low)
    first = part.to(tl.int32) * length * BLOCK
    last = tl.minimum(first + length * BLOCK, columns)
    local = tl.load(target + row) - offset
    has_target = (local >= first) & (local < last)
    target_column = tl.where(has_target, local, -1).to(tl.int32)
    end = end_of(columns, PADDED)
    for start in range(first, last, BLOCK):
        column = start + lane
        inside = column < columns  # of a part before the last: always
        z = load_logits(
            x, bias, start, column, columns, column < end, pre, post, HAS_BIAS, HAS_CAP, BLOCK
        )
        if TRACK & 8:
            z_sum += tl.where(inside, z, 0.0)
        z = tl.where(inside, z, float("-inf"))
        not_nan = tl.where(z == z, z, float("-inf"))
        new = tl.maximum(top, tl.max(not_nan))
        m = tl.where(new == float("-inf"), 0.0, new)
        delta_max = tl.where(top == float("-inf"), 0.0, top - m)
        rescale = tl.where(top == float("-inf"), 0.0, exp_difference(top, m, EXACT))
        centred = z - m
        e = exp_difference(z, m, EXACT)
        # The sums leave out the target. Times 0 rather than 0: a NaN there is still one of the row.
        e = tl.where(column == target_column, 0.0 * e, e)
        if TRACK & 2:
            e_z = rescale * (e_z + delta_max * total) + tl.where(e == 0.0, 0.0, e * centred)
        if TRACK & 4:
            e_sq = rescale * rescale * e_sq + e * e
        total = rescale * total + e
        top = new
        if TRACK & 16:
            second = tl.maximum(second, tl.minimum(best, not_nan))
        if (TRACK & 1) | (TRACK & 16):
            # A NaN wins, as it does in torch.argmax, and what came first stays.
            better = (z > best) | ((z != z) & (best == best))
            best = tl.where(better, z, best)
            best_id = tl.where(better, column, best_id)
    top_64 = top.to(tl.float64)
    top_id = tl.zeros((), tl.int32)
    runner_up = top
    if (TRACK & 1) | (TRACK & 16):
        nan_id = tl.min(tl.where(best != best, best_id, NO_COLUMN))
        top_id = tl.min(tl.where(best == top, best_id, NO_COLUMN))
        top_id = tl.where(nan_id != NO_COLUMN, nan_id, top_id)
        # All −inf: no lane has exceeded its start.
        top_id = tl.where(top_id == NO_COLUMN, first, top_id)
        top_64 = tl.where(nan_id != NO_COLUMN, float("nan"), top_64)
        if TRACK & 16:
            rest = tl.where((best_id == top_id) | (best != best), second, tl.maximum(best, second))
            runner_up = tl.max(rest)
    picked = tl.load(x + local, mask=has_target, other=0.0).to(tl.float32)
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + local, mask=has_target, other=0.0).to(tl.float32)
    picked = logits(picked, b, pre, post, HAS_BIAS, HAS_CAP)
    merge_into(
        state, argmax, state_stride,
        top_64, tl.sum(total.to(tl.float64)), picked.to(tl.float64), has_target,
        tl.sum(e_z.to(tl.float64)), tl.sum(e_sq.to(tl.float64)), tl.sum(z_sum.to(tl.float64)),
        runner_up.to(tl.float64), top_id.to(tl.int64) + offset,
        TRACK,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["parts", "source_stride", "part_stride", "argmax_stride", "state_stride",
                       "length", "columns", "offset"],
    do_not_specialize_on_alignment=["target", "state", "argmax"],
)  # fmt: skip
def merge_kernel(
    source, source_argmax, target, state, argmax,
    parts, source_stride, part_stride, argmax_stride, state_stride, length, columns, offset,
    TRACK: tl.constexpr,
):  # fmt: skip
    """Merge `parts` states of a row, each of `length` columns, in order into the running one."""
    row = tl.program_id(0).to(tl.int64)
    source += row
    source_argmax += row
    state += row
    argmax += row
    local = tl.load(target + row) - offset
    for part in range(parts):
        of_part = source + part * part_stride
        first = part * length
        last = tl.minimum(first + length, columns)
        second = tl.load(of_part + 6 * source_stride)
        merge_into(
            state, argmax, state_stride,
            tl.load(of_part), tl.load(of_part + source_stride),
            tl.load(of_part + 2 * source_stride),
            (local >= first) & (local < last), tl.load(of_part + 3 * source_stride),
            tl.load(of_part + 4 * source_stride), tl.load(of_part + 5 * source_stride), second,
            tl.load(source_argmax + part * argmax_stride),
            TRACK,
        )  # fmt: skip


def stats_update(chunk: Chunk, target: Tensor, state: RowState, track: int) -> None:
    rows, columns = check_chunk(chunk)
    x, bias, transform, offset = chunk
    check_state(rows, state, target)
    kind = shape_class(columns)
    if track not in (0, TRACK_ARGMAX):
        kind += "-all"  # more to hold in registers
    chosen = config("stats", kind, x.device)
    parts = parts_of(rows, columns, chosen["BLOCK"], x.device)
    length = blocks(blocks(columns, parts), chosen["BLOCK"])  # in blocks
    whole = state if parts == 1 else new_state(rows, x.device, parts)
    launch(
        stats_kernel, (rows * parts,), x,
        x, bias, target, *whole, columns, x.stride(0), whole.values.stride(-2),
        whole.values.stride(0), whole.argmax.stride(0), offset, parts, length,
        **transform_arguments(bias, transform), TRACK=track, PADDED=padded(x), **chosen,
    )  # fmt: skip
    if parts > 1:
        merge_parts(whole, target, state, length * chosen["BLOCK"], columns, offset, track)


def parts_of(rows: int, columns: int, block: int, device: torch.device) -> int:
    """In how many parts a row is cut, so that few rows still fill the device."""
    index = device.index if device.type == "cuda" else None
    return max(
        1, min(4 * multiprocessors(index) // max(rows, 1), blocks(columns, block), MAX_PARTS)
    )


def merge_parts(
    parts: RowState,
    target: Tensor,
    state: RowState,
    length: int,
    columns: int,
    offset: int,
    track: int,
) -> None:
    """Merge the states of parts of `length` columns, together `columns`, into the running one."""
    states, maxima = parts
    launch(
        merge_kernel, (len(target),), target,
        states, maxima, target, *state, len(states), states.stride(1), states.stride(0),
        maxima.stride(0), state.values.stride(0), length, columns, offset, TRACK=track, num_warps=1,
    )  # fmt: skip
