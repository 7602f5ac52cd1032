"""Products and their statistics in one kernel: the logits are never stored.

Floors: 2·N·V·D operations; bytes, hidden and weight read once (they are read again from the
second-level cache by every program that shares them). What it saves beside a vendor product and
`stats_update` is one write and one read of N·V elements; what it loses is how much slower its
product is than the vendor's. Which wins: not measured, so the table says "vendor".

A program owns ROWS tokens and a part of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.contract import TRACK_ARGMAX, RowState, new_state
from ift_kernels.backends.layout_checks import check_rows, check_state, check_vectors
from ift_kernels.backends.triton.common import (
    exp_difference,
    logits,
    precision,
    product,
    transform_arguments,
)
from ift_kernels.backends.triton.launch import blocks, config, launch, multiprocessors
from ift_kernels.backends.triton.statistics import MAX_PARTS, merge_parts
from ift_kernels.common.transform import LogitTransform

NO_COLUMN = tl.constexpr(2**31 - 1)  # larger than any


@triton.jit(do_not_specialize=["rows", "parts", "length"])
def fused_kernel(
    hidden, weight, bias, target, state, argmax,
    rows, columns, width, hidden_stride, weight_stride, state_stride, part_stride, argmax_stride,
    parts, length, pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TRACK: tl.constexpr,
    PRECISION: tl.constexpr, GRAIN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = hidden.dtype.element_ty == tl.float32
    # Programs next to each other share columns: the weight is the larger of the two.
    groups = tl.cdiv(rows, ROWS)
    part = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid_row = row < rows
    lane, inner = tl.arange(0, COLUMNS), tl.arange(0, INNER)
    target_id = tl.load(target + row, mask=valid_row, other=-1)
    low = tl.full((ROWS,), float("-inf"), tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    top, second, total, e_z, e_sq, z_sum, picked = low, low, zero, zero, zero, zero, zero
    best_id = tl.zeros((ROWS,), tl.int32)
    has_target = tl.zeros((ROWS,), tl.int32)
    seen_nan = tl.zeros((ROWS,), tl.int32)  # a NaN, whose column is `best_id`
    first = part * length * GRAIN
    last = tl.minimum(first + length * GRAIN, columns)
    for start in range(first, last, COLUMNS):
        column = start + lane
        inside = column < columns
        x = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, width, INNER):
            in_width = k + inner < width
            h_pointer = hidden + row[:, None] * hidden_stride + (k + inner)[None, :]
            h = tl.load(h_pointer, mask=valid_row[:, None] & in_width[None, :], other=0.0)
            w_pointer = weight + column.to(tl.int64)[:, None] * weight_stride + (k + inner)[None, :]
            w = tl.load(w_pointer, mask=inside[:, None] & in_width[None, :], other=0.0)
            x = product(h, tl.trans(w), x, PRECISION)
        # The same log-probabilities as where the vendor's product stores its 16 bits.
        x = x.to(hidden.dtype.element_ty).to(tl.float32)
        b = tl.zeros((COLUMNS,), tl.float32)
        if HAS_BIAS:
            b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        z = logits(x, b[None, :], pre, post, HAS_BIAS, HAS_CAP)
        is_target = (target_id[:, None] == column[None, :]) & inside[None, :]
        picked += tl.sum(tl.where(is_target, z, 0.0), axis=1)
        has_target = tl.maximum(has_target, tl.max(tl.where(is_target, 1, 0), axis=1))
        if TRACK & 8:
            z_sum += tl.sum(tl.where(inside[None, :], z, 0.0), axis=1)
        z = tl.where(inside[None, :], z, float("-inf"))
        not_nan = tl.where(z == z, z, float("-inf"))
        tile_max = tl.max(not_nan, axis=1)
        if TRACK & 17:
            is_max = not_nan == tile_max[:, None]
            tile_id = tl.min(tl.where(is_max, column[None, :], NO_COLUMN), axis=1)
            nan_id = tl.min(tl.where(z != z, column[None, :], NO_COLUMN), axis=1)
            if TRACK & 16:
                rest = tl.where(column[None, :] == tile_id[:, None], float("-inf"), not_nan)
                rest = tl.maximum(tl.max(rest, axis=1), tl.minimum(tile_max, top))
                second = tl.maximum(second, rest)
            # A NaN wins, as it does in torch.argmax, and what came first stays.
            best_id = tl.where((tile_max > top) & (seen_nan == 0), tile_id, best_id)
            first_nan = (nan_id != NO_COLUMN) & (seen_nan == 0)
            best_id = tl.where(first_nan, nan_id, best_id)
            seen_nan = tl.where(first_nan, 1, seen_nan)
        new = tl.maximum(top, tile_max)
        m = tl.where(new == float("-inf"), 0.0, new)
        delta_max = tl.where(top == float("-inf"), 0.0, top - m)
        rescale = tl.where(top == float("-inf"), 0.0, exp_difference(top, m, EXACT))
        centred = z - m[:, None]
        e = exp_difference(z, m[:, None], EXACT)
        e = tl.where(is_target, 0.0 * e, e)  # as in statistics.py
        if TRACK & 2:
            part_z = tl.sum(tl.where(e == 0.0, 0.0, e * centred), axis=1)
            e_z = rescale * (e_z + delta_max * total) + part_z
        if TRACK & 4:
            e_sq = rescale * rescale * e_sq + tl.sum(e * e, axis=1)
        total = rescale * total + tl.sum(e, axis=1)
        top = new

    state += part.to(tl.int64) * part_stride + row
    top_64 = tl.where(seen_nan != 0, float("nan"), top.to(tl.float64))
    tl.store(state, top_64, mask=valid_row)
    tl.store(state + state_stride, total.to(tl.float64), mask=valid_row)
    tl.store(state + 2 * state_stride, picked.to(tl.float64), mask=valid_row & (has_target != 0))
    tl.store(state + 3 * state_stride, e_z.to(tl.float64), mask=valid_row)
    tl.store(state + 4 * state_stride, e_sq.to(tl.float64), mask=valid_row)
    tl.store(state + 5 * state_stride, z_sum.to(tl.float64), mask=valid_row)
    tl.store(state + 6 * state_stride, second.to(tl.float64), mask=valid_row)
    argmax_pointer = argmax + part.to(tl.int64) * argmax_stride + row
    tl.store(argmax_pointer, best_id.to(tl.int64), mask=valid_row)


def fused_statistics(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of the same dtype
    bias: Tensor | None,  # (V,) float32
    transform: LogitTransform,
    target: Tensor,  # (N,)
    state: RowState,
    track: int,
) -> bool:
    """Statistics of the whole vocabulary into an empty running state.

    False, with nothing done, where the table has not measured this to beat the vendor's product
    and `stats_update`, or it cannot serve.
    """
    kind = "half" if hidden.dtype.itemsize == 2 else "single"
    can_serve = hidden.dtype == weight.dtype and weight.stride(-1) == 1 and len(hidden) > 0
    if not can_serve or not config("forward", kind, hidden.device)["FUSED"]:
        return False
    (rows, width), columns = hidden.shape, weight.shape[0]
    check_rows("hidden", hidden)
    check_rows("weight", weight, width)
    check_state(rows, state, target)
    check_vectors(columns, bias=bias)
    if track not in (0, TRACK_ARGMAX):
        kind += "-all"  # more to hold beside the products
    chosen = config("fused", kind, hidden.device)
    grain = 4 * chosen["COLUMNS"]  # in which the vocabulary is cut
    index = hidden.device.index if hidden.device.type == "cuda" else None
    groups = blocks(rows, chosen["ROWS"])
    parts = 4 * multiprocessors(index) // max(groups, 1)
    parts = max(1, min(parts, blocks(columns, grain), MAX_PARTS))
    length = blocks(blocks(columns, grain), parts)
    whole = new_state(rows, hidden.device, parts)
    launch(
        fused_kernel, (groups * parts,), hidden,
        hidden, weight, bias, target, *whole, rows, columns, width,
        hidden.stride(0), weight.stride(0), whole.values.stride(1),
        whole.values.stride(0), whole.argmax.stride(0), parts, length,
        **transform_arguments(bias, transform), TRACK=track,
        PRECISION=precision(hidden.dtype), GRAIN=grain, **chosen,
    )  # fmt: skip
    merge_parts(whole, target, state, length * grain, columns, 0, track)
    return True
