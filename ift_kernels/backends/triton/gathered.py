"""Products with head rows that are picked by id: of the active set, k·N·V·D multiply-adds each.

Floors: 2·k·N·V·D operations for each of the three; bytes, k·N·C·D / block elements of head rows
gathered (or the hidden states once for each group of ids), N·D or V·D written once. Distance: not
measured.

Products become gradients in float32, before they are first rounded: forward took its log-sum-exp of
unrounded ones, and with others the gradient of a nearly certain token would be off by a rounding.

Active columns are *items*: block after block with ids ascending, (block of rows, id) in `pairs` and
`block` gradients of products each in `store`. Every program owns what it writes: no atomics, one
order of sums. Items beyond the capacity of the store are left out; the caller looks at the count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ift_kernels.backends.triton.common import precision, product, transform_arguments
from ift_kernels.backends.triton.gradient import active_gradient
from ift_kernels.backends.triton.launch import blocks, check_rows, check_vectors, config, launch
from ift_kernels.transform import LogitTransform


@triton.jit(do_not_specialize=["capacity"])
def list_kernel(marks, position, pairs, columns, column_blocks, capacity, BLOCK: tl.constexpr):
    """Write (block, id) of every marked column to its place."""
    program = tl.program_id(0).to(tl.int64)
    number = program // column_blocks
    column = (program % column_blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    marked = tl.load(marks + number * columns + column, mask=inside, other=0) != 0
    slot = tl.load(position + number * columns + column, mask=inside, other=0).to(tl.int64) - 1
    kept = marked & inside & (slot < capacity)
    blank = tl.zeros((BLOCK,), tl.int64)
    tl.store(pairs + 2 * slot, blank + number, mask=kept)
    tl.store(pairs + 2 * slot + 1, column.to(tl.int64), mask=kept)


@triton.jit(do_not_specialize=["rows", "offset"])
def products_kernel(
    hidden, weight, pairs, starts, store, bias, target, norm, coef, base, profile,
    rows, width, hidden_stride, weight_stride, groups,
    offset, norm_stride, coef_stride, base_stride, tile, gain, height, rate,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, ITEMS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """``store[item]``: the gradient of ``weight[id] @ hidden[block].T``."""
    number = tl.program_id(0) // groups
    last = tl.load(starts + number + 1)
    item = tl.load(starts + number) + tl.program_id(0) % groups * ITEMS + tl.arange(0, ITEMS)
    listed = item < last
    if tl.max(listed.to(tl.int32)) == 0:
        return
    ids = tl.load(pairs + 2 * item + 1, mask=listed, other=0)
    row = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    inner = tl.arange(0, INNER)
    # Rows first: matrix instructions of sm_90 and sm_100 take 64 or 128 of them, items are fewer.
    x = tl.zeros((BLOCK, ITEMS), tl.float32)
    for k in range(0, width, INNER):
        deep = k + inner < width
        w_at = weight + ids[:, None] * weight_stride + (k + inner)[None, :]
        w = tl.load(w_at, mask=listed[:, None] & deep[None, :], other=0.0)
        h_at = hidden + row[:, None] * hidden_stride + (k + inner)[None, :]
        h = tl.load(h_at, mask=there[:, None] & deep[None, :], other=0.0)
        x = product(h, tl.trans(w), x, PRECISION)
    grad = active_gradient(
        tl.trans(x), ids, row[None, :], listed, there[None, :], bias, target, norm, coef, base,
        profile, offset, norm_stride, coef_stride, base_stride, tile, gain, height, rate,
        HAS_BIAS, HAS_CAP,
    )  # fmt: skip
    at = store + item[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(at, grad.to(store.dtype.element_ty), mask=listed[:, None])


@triton.jit(do_not_specialize=["rows"])
def hidden_kernel(
    store, weight, pairs, starts, out,
    rows, width, weight_stride, width_blocks,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``out[block] += Σ items store[item].T @ weight[id]``, float32."""
    number = tl.program_id(0) // width_blocks
    column = tl.program_id(0) % width_blocks * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    first, last = tl.load(starts + number), tl.load(starts + number + 1)
    in_block = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(first, last, ITEMS):
        item = start + tl.arange(0, ITEMS)
        listed = item < last
        ids = tl.load(pairs + 2 * item + 1, mask=listed, other=0)
        dz = tl.load(
            store + item[:, None] * BLOCK + in_block[None, :], mask=listed[:, None], other=0.0
        )
        w_at = weight + ids[:, None] * weight_stride + column[None, :]
        w = tl.load(w_at, mask=listed[:, None] & inside[None, :], other=0.0)
        total = product(tl.trans(dz), w, total, PRECISION)
    row = number.to(tl.int64) * BLOCK + in_block
    at = out + row[:, None] * width + column[None, :]
    there = (row < rows)[:, None] & inside[None, :]
    tl.store(at, total + tl.load(at, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=["rows", "number_of_blocks", "capacity"])
def weight_kernel(
    store, hidden, marks, position, common, profile, out,
    rows, columns, width, hidden_stride, out_stride, number_of_blocks, tile, width_blocks, capacity,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``out[id] = common[id // tile]·profile[id] + Σ blocks store[item] @ hidden[block]``."""
    ids = (tl.program_id(0) // width_blocks * IDS + tl.arange(0, IDS)).to(tl.int64)
    column = tl.program_id(0) % width_blocks * WIDTH + tl.arange(0, WIDTH)
    listed, inside = ids < columns, column < width
    at_common = common + (ids // tile)[:, None] * width + column[None, :]
    total = tl.load(at_common, mask=listed[:, None] & inside[None, :], other=0.0)
    total *= tl.load(profile + ids, mask=listed, other=0.0)[:, None]
    in_block = tl.arange(0, BLOCK)
    for number in range(number_of_blocks):
        here = (tl.zeros_like(ids) + number) * columns + ids
        marked = tl.load(marks + here, mask=listed, other=0) != 0
        # Few ids are active in few blocks; what is left out here is most of the work.
        if tl.max(marked.to(tl.int32)) != 0:
            item = tl.load(position + here, mask=marked, other=1).to(tl.int64) - 1
            kept = marked & (item < capacity)
            at = store + item[:, None] * BLOCK + in_block[None, :]
            dz = tl.load(at, mask=kept[:, None], other=0.0)
            row = (tl.zeros((BLOCK,), tl.int64) + number) * BLOCK + in_block
            h_at = hidden + row[:, None] * hidden_stride + column[None, :]
            h = tl.load(h_at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
            total = product(dz, h, total, PRECISION)
    at = out + ids[:, None] * out_stride + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=listed[:, None] & inside[None, :])


@dataclass(frozen=True)
class Items:
    """The active columns of a range of the vocabulary."""

    marks: Tensor  # uint8 (blocks, C), contiguous
    position: Tensor  # int32 (blocks · C,): how many marks come up to here, this one included
    pairs: Tensor  # int64 (capacity, 2)
    starts: Tensor  # int64 (blocks + 1,), at most the capacity
    block: int

    @property
    def capacity(self) -> int:
        """Items that there is room for."""
        return self.pairs.shape[0]

    @classmethod
    def of(cls, marks: Tensor, capacity: int, block: int) -> Items:
        """Listed without waiting for the device."""
        number, columns = marks.shape
        position = marks.flatten().cumsum(0, dtype=torch.int32)
        ends = position.view(number, columns)[:, -1].long()
        starts = torch.cat([ends.new_zeros(1), ends]).clamp(max=capacity)
        pairs = torch.zeros((capacity, 2), dtype=torch.int64, device=marks.device)
        chosen = config("list", "all", marks.device)
        column_blocks = blocks(columns, chosen["BLOCK"])
        launch(
            list_kernel, (number * column_blocks,), marks,
            marks, position, pairs, columns, column_blocks, capacity, **chosen,
        )  # fmt: skip
        return cls(marks, position, pairs, starts, block)

    def gradients(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (C, D), from id `offset` on
        bias: Tensor | None,  # (C,)
        transform: LogitTransform,
        target: Tensor,  # (N,)
        offset: int,
        norm: Tensor,  # these three as for `active_gradient_`, rows padded to whole blocks
        coef: Tensor,
        base: Tensor,
        tile: int,
        profile: Tensor,  # (C,)
    ) -> Tensor:
        """(capacity, block) gradients of the items' products, in the dtype of `hidden`."""
        padded = self.marks.shape[0] * self.block
        for name, matrix in (("norm", norm), ("coef", coef), ("base", base)):
            check_rows(name, matrix, padded)
        check_vectors(self.marks.shape[1], profile=profile)
        store = hidden.new_empty((self.capacity, self.block))
        chosen = config("products", _kind(hidden), hidden.device)
        groups = blocks(self.marks.shape[1], chosen["ITEMS"])
        launch(
            products_kernel, (self.marks.shape[0] * groups,), hidden,
            hidden, weight, self.pairs, self.starts, store, bias, target, norm, coef, base,
            profile, *hidden.shape, hidden.stride(0), weight.stride(0), groups, offset,
            norm.stride(0), coef.stride(0), base.stride(0), tile,
            **transform_arguments(bias, transform),
            PRECISION=precision(hidden.dtype), BLOCK=self.block, **chosen,
        )  # fmt: skip
        return store

    def add_to_hidden(self, store: Tensor, weight: Tensor, out: Tensor) -> None:
        """Add the share of the items to `out`, float32 (N, D)."""
        (rows, width), chosen = out.shape, config("hidden", _kind(store), out.device)
        width_blocks = blocks(width, chosen["WIDTH"])
        launch(
            hidden_kernel, (self.marks.shape[0] * width_blocks,), out,
            store, weight, self.pairs, self.starts, out, rows, width, weight.stride(0),
            width_blocks, PRECISION=precision(store.dtype), BLOCK=self.block, **chosen,
        )  # fmt: skip

    def weight_gradient(
        self,
        store: Tensor,
        hidden: Tensor,
        common: Tensor,  # (tiles, D)
        tile: int,
        profile: Tensor,  # (C,)
        out: Tensor,
    ) -> None:
        """Write dW of the range of ids: `common` times `profile` and the share of the items."""
        check_vectors(self.marks.shape[1], profile=profile)
        (rows, width), chosen = hidden.shape, config("weight", _kind(store), out.device)
        (number, columns), width_blocks = self.marks.shape, blocks(width, chosen["WIDTH"])
        launch(
            weight_kernel, (blocks(columns, chosen["IDS"]) * width_blocks,), out,
            store, hidden, self.marks, self.position, common, profile, out, rows, columns, width,
            hidden.stride(0), out.stride(0), number, tile, width_blocks, self.capacity,
            PRECISION=precision(store.dtype), BLOCK=self.block, **chosen,
        )  # fmt: skip


def _kind(like: Tensor) -> str:
    return "half" if like.element_size() == 2 else "single"
