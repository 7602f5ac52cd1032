"""Active columns of products to their gradient, in place: one read and one write.

Floors per element: 4 bytes moved (bf16); one exponential and some 15 float operations. Distance:
not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.triton.common import logits, row_gradient, slope, transform_arguments
from ift_kernels.backends.triton.launch import blocks, check_rows, config, launch
from ift_kernels.transform import LogitTransform


@triton.jit
def active_gradient(
    x, column, at, listed, there, bias, target, norm, coef, base, profile,
    offset, norm_stride, coef_stride, base_stride, tile, gain, height, rate,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Gradient of float32 products `x` (items, rows), less that of their tail.

    Which is `base` of tail tile and row times `profile` of the column. Items have a `column` each
    and are there if `listed`; `at` broadcasts to the rows of each, whose norm, coef and base may be
    read everywhere, and whose target only where `there`.
    """
    b = tl.zeros_like(column).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + column, mask=listed, other=0.0).to(tl.float32)
    z = logits(x, b[:, None], gain, height, HAS_BIAS, HAS_CAP)
    norm_0 = tl.load(norm + at).to(tl.float32)
    norm_1 = tl.load(norm + norm_stride + at).to(tl.float32)
    hit = tl.load(coef + at).to(tl.float32)
    one = tl.load(coef + coef_stride + at).to(tl.float32)
    per_log_p = tl.load(coef + 2 * coef_stride + at).to(tl.float32)
    flat = tl.load(coef + 3 * coef_stride + at).to(tl.float32)
    grad = row_gradient(z, norm_0, norm_1, one, per_log_p, flat)
    local = tl.load(target + at, mask=there, other=-1) - offset
    grad += tl.where(local == column[:, None], hit, 0.0)
    grad *= slope(z, height, rate, HAS_CAP)
    tail = base + (column // tile)[:, None] * base_stride + at
    share = tl.load(profile + column, mask=listed, other=0.0)[:, None]
    grad -= tl.load(tail, mask=listed[:, None], other=0.0).to(tl.float32) * share
    dead = (hit == 0.0) & (one == 0.0) & (per_log_p == 0.0) & (flat == 0.0)
    return tl.where(dead, 0.0, grad)


@triton.jit(do_not_specialize=["marked", "rows", "offset", "row_blocks"])
def gradient_kernel(
    store, pairs, bias, target, norm, coef, base, profile,
    marked, rows, offset, norm_stride, coef_stride, base_stride, block, tile, row_blocks,
    gain, height, rate,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ITEMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    item = program // row_blocks * ITEMS + tl.arange(0, ITEMS)
    in_block = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    listed = item < marked
    inside = (in_block < block)[None, :]
    there = listed[:, None] & inside
    number = tl.load(pairs + 2 * item, mask=listed, other=0)
    column = tl.load(pairs + 2 * item + 1, mask=listed, other=0)
    # Of rows outside the block, row 0: what comes out is not stored.
    at = tl.where(inside, number[:, None] * block + in_block[None, :], 0)
    place = store + item[:, None] * block + in_block[None, :]
    x = tl.load(place, mask=there, other=0.0).to(tl.float32)
    grad = active_gradient(
        x, column, at, listed, there & (at < rows), bias, target, norm, coef, base, profile,
        offset, norm_stride, coef_stride, base_stride, tile, gain, height, rate, HAS_BIAS, HAS_CAP,
    )  # fmt: skip
    tl.store(place, grad.to(store.dtype.element_ty), mask=there)


def active_gradient_(
    store: Tensor,
    pairs: Tensor,
    rows: int,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    norm: Tensor,
    coef: Tensor,
    base: Tensor,
    tile: int,
    profile: Tensor,
    row_major: Tensor | None = None,
) -> None:
    marked, block = store.shape
    padded = blocks(rows, block) * block
    for name, matrix in (("norm", norm), ("coef", coef), ("base", base)):
        check_rows(name, matrix, padded)
    if pairs.shape != (marked, 2) or not pairs.is_contiguous() or not store.is_contiguous():
        raise RuntimeError(f"pairs: {tuple(pairs.shape)} for a store of {tuple(store.shape)}")
    if blocks(len(profile), tile) != len(base) or not profile.is_contiguous():
        raise RuntimeError(f"profile: {tuple(profile.shape)} for a base of {tuple(base.shape)}")
    if row_major is not None:
        raise RuntimeError("row_major: this backend does not ask for transposed gradients")
    chosen = config("gradient", "all", store.device)
    row_blocks = blocks(block, chosen["ROWS"])
    launch(
        gradient_kernel, (blocks(marked, chosen["ITEMS"]) * row_blocks,), store,
        store, pairs, bias, target, norm, coef, base, profile, marked, rows, offset,
        norm.stride(0), coef.stride(0), base.stride(0), block, tile, row_blocks,
        **transform_arguments(bias, transform), **chosen,
    )  # fmt: skip
