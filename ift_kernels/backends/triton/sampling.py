"""A tile of products to the k best logits, or to a Gumbel-max draw: one read.

Floors per element: 2 bytes read (bf16). Top-k: a comparison, and a merge for each of the
O(k·log(V / k)) elements that enter the best so far. Gumbel: a quarter of ten Philox rounds (some 20
integer operations) and two logarithms, more than the read on most devices. Distances: not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends import reference
from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.layout_checks import check_chunk, check_top_k, check_vectors
from ift_kernels.backends.triton.common import (
    end_of,
    load_logits,
    padded,
    transform_arguments,
)
from ift_kernels.backends.triton.launch import config, launch, power_of_two, shape_class

MIN_KEY = tl.constexpr(-(2**63))
MAX_TOP_K = 64  # as in `top_k_kernel`
NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def key_of(z, ids):
    """int64 that orders by logit, then by lowest id; a NaN is above all, −0 equals 0."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(z != z, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (ids ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit(
    do_not_specialize=["columns", "offset", "k"], do_not_specialize_on_alignment=["values", "ids"]
)
def top_k_kernel(
    x, bias, values, ids,
    columns, stride, offset, k,
    pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    slot = tl.arange(0, K).to(tl.int64)
    used = slot < k
    value = tl.load(values + row * k + slot, mask=used, other=0.0)
    chosen = tl.load(ids + row * k + slot, mask=used, other=0)
    # Slots not in use lie above everything and are never replaced; placeholders below everything,
    # all different, so that one of them is replaced at a time.
    best = tl.where(chosen < 0, slot + MIN_KEY, key_of(value, chosen.to(tl.int32)))
    best = tl.where(used, best, 0x7FFFFFFFFFFFFFFF - slot)
    worst = tl.min(best)
    lane = tl.arange(0, BLOCK)
    end = end_of(columns, PADDED)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        z = load_logits(
            x, bias, start, column, columns, column < end, pre, post, HAS_BIAS, HAS_CAP, BLOCK
        )
        key = tl.where(inside, key_of(z, column + offset), MIN_KEY)
        top = tl.max(key)
        while top > worst:
            best = tl.where(best == worst, top, best)
            worst = tl.min(best)
            key = tl.where(key == top, MIN_KEY, key)
            top = tl.max(key)
    # Keys are unique, so the number of larger ones is the place in descending order.
    real = tl.where(used, best, MIN_KEY)
    place = tl.sum(tl.where(real[None, :] > best[:, None], 1, 0), axis=1)
    ordered = (best >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    logit = bits.to(tl.float32, bitcast=True)  # of 0x7FFFFFFF: a NaN
    best_id = (best & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    # Fewer columns than k, so far: still a placeholder.
    empty = best < MIN_KEY + 64  # = the largest K
    tl.store(values + row * k + place, tl.where(empty, float("-inf"), logit), mask=used)
    tl.store(ids + row * k + place, tl.where(empty, -1, best_id.to(tl.int64)), mask=used)


@triton.jit
def minus_log_exponential(bits):
    """−log(−log1p(−u)) of the uniform numbers u = (bits + ½)·2⁻³²: Gumbel noise.

    Not −log(−log u): log1p of a small −u keeps its digits, so the largest is 22.9, not 16.6.
    """
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = tl.minimum(u, 0.99999994)
    # log1p(−u) = log(w)·(−u)/(w − 1) with w = 1 − u rounded: the errors of w cancel.
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return -tl.log(exponential)


@triton.jit(
    do_not_specialize=["columns", "offset", "seed_low", "seed_high"],
    do_not_specialize_on_alignment=["rows", "best", "logit", "ids"],
)
def gumbel_kernel(
    x, bias, rows, best, logit, ids,
    columns, stride, best_stride, ids_stride, offset, seed_low, seed_high,
    pre, post, plain_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PADDED: tl.constexpr, SKIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    number = tl.load(rows + row).to(tl.int64)
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    low = (number & 0xFFFFFFFF).to(tl.uint32)
    high = ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)
    lane = tl.arange(0, BLOCK)
    quarter = tl.arange(0, BLOCK // 4)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    top_logit = top
    top_id = tl.full((BLOCK,), NO_ID, tl.int32)
    # Four ids share a counter, so blocks start at multiples of four ids.
    end = end_of(columns, PADDED)
    for start in range(-SKIPPED, columns, BLOCK):
        column = start + lane
        inside = (column >= 0) & (column < columns)
        readable = (column >= 0) & (column < end)
        z = load_logits(
            x, bias, start, column, columns, readable, pre, post, HAS_BIAS, HAS_CAP, BLOCK
        )
        counter = ((start + offset) // 4 + quarter).to(tl.uint32)
        blank = tl.zeros_like(counter)
        w0, w1, w2, w3 = tl.philox(seed, counter, blank + low, blank + high, blank)
        bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        score = z + minus_log_exponential(bits)
        score = tl.where(inside, score, float("-inf"))
        better = (score > top) | ((score != score) & (top == top))
        top = tl.where(better, score, top)
        top_logit = tl.where(better, z, top_logit)
        top_id = tl.where(better, column, top_id)
    nan_id = tl.min(tl.where(top != top, top_id, NO_ID))
    score = tl.max(tl.where(top == top, top, float("-inf")))
    drawn = tl.where(nan_id != NO_ID, nan_id, tl.min(tl.where(top == score, top_id, NO_ID)))
    score = tl.where(nan_id != NO_ID, float("nan"), score)
    # One lane has it, or none where all is −inf.
    is_drawn = top_id == drawn
    is_nan = tl.max(tl.where(is_drawn & (top_logit != top_logit), 1, 0)) > 0
    drawn_logit = tl.where(is_drawn & (top_logit == top_logit), top_logit, float("-inf"))
    drawn_logit = tl.max(drawn_logit)
    drawn_logit = tl.where(is_nan, float("nan"), drawn_logit)
    old = tl.load(best + row * best_stride)
    is_new_max = (score > old) | ((score != score) & (old == old))
    tl.store(best + row * best_stride, score, mask=is_new_max)
    tl.store(logit + row, drawn_logit, mask=is_new_max)
    tl.store(ids + row * ids_stride, drawn.to(tl.int64) + offset, mask=is_new_max)


def partly_plain_torch() -> list[str]:
    return [f"top_k_update of k > {MAX_TOP_K}"]


def top_k_update(chunk: Chunk, values: Tensor, ids: Tensor) -> None:
    if values.shape[1] > MAX_TOP_K:  # registers of one program
        reference.top_k_update(chunk, values, ids)
        return
    rows, columns = check_chunk(chunk)
    x, bias, transform, offset = chunk
    check_top_k(rows, values, ids)
    k = values.shape[1]
    launch(
        top_k_kernel, (rows,), x,
        x, bias, values, ids, columns, x.stride(0), offset, k,
        **transform_arguments(bias, transform), PADDED=padded(x), K=power_of_two(max(k, 2)),
        **config("top_k", shape_class(columns), x.device),
    )  # fmt: skip


def gumbel_update(
    chunk: Chunk, seed: int, rows: Tensor, best: Tensor, logit: Tensor, ids: Tensor
) -> None:
    count, columns = check_chunk(chunk)
    x, bias, transform, offset = chunk
    check_vectors(count, rows=rows, logit=logit)
    launch(
        gumbel_kernel, (count,), x,
        x, bias, rows, best, logit, ids, columns, x.stride(0), best.stride(0),
        ids.stride(0), offset, _half(seed), _half(seed >> 32),
        **transform_arguments(bias, transform), PADDED=padded(x), SKIPPED=offset % 4,
        **config("gumbel", shape_class(columns), x.device),
    )  # fmt: skip


def _half(seed: int) -> int:
    """The low 32 bits as a signed number: a larger one would be another type, and compiled anew."""
    return (seed + 2**31) % 2**32 - 2**31
