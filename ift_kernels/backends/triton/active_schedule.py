"""The active-set backward on a GPU: marks in the forward product, gathered products in backward.

Read `ift_kernels.active` first: the mathematics is the same. What differs is what is kept: no
products, only marks and the sums of the tail. Backward forms the active products again, k·N·V·D
multiply-adds, in one launch for all blocks, where the schedule for CPUs would launch one product a
block and tile. So the device need not be asked how many there are before it goes on; backward asks
once, to cut the vocabulary into ranges that fit the workspace, or never where the room is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ift_kernels import active, active_backward, linear_ops, syncfree
from ift_kernels.active import Formed, Tiling
from ift_kernels.backends.triton.fused import Marking, fused_statistics
from ift_kernels.backends.triton.gathered import Items
from ift_kernels.backends.triton.launch import blocks, config
from ift_kernels.backends.triton.segments import sum_segments
from ift_kernels.engine import Head, Results, RowGradient

OWN = (-1, 0)  # in a `Formed.layout`, in place of where a tile starts: this schedule made it
BLOCKS = (32, 64, 128)  # of rows, that a program can own


def active_serves(head: Head, at: Tiling) -> bool:
    """Whether this schedule can serve the call; else the one for CPUs does."""
    same = head.weight.dtype == head.hidden.dtype and head.weight.stride(-1) == 1
    fused = bool(config("active", "all", head.hidden.device)["FUSED"])
    block = at.options.block
    # Items are counted in 32 bits.
    few = blocks(head.hidden.shape[0], block) * head.vocabulary < 2**31
    return fused and same and few and block in BLOCKS


def active_form(
    head: Head, target: Tensor, track: int, at: Tiling
) -> tuple[Tensor, Tensor, Formed]:
    """Running state, argmax, and the marks and tails of the whole vocabulary.

    Blocks are those of the options, also where there are fewer rows.
    """
    at = replace(at, block=at.options.block)
    n, v = head.hidden.shape[0], head.vocabulary
    state, argmax = head.backend.new_state(n, head.hidden.device)
    like, tiles = head.hidden, blocks(v, at.tail)
    marks = torch.empty((blocks(n, at.block), v), dtype=torch.uint8, device=like.device)
    tails = torch.zeros((4, tiles, n), dtype=torch.float32, device=like.device)
    threshold = at.options.threshold
    if n:
        fused_statistics(
            like, head.weight, head.bias, head.transform, target, state, argmax, track,
            Marking(marks, tails), at.block, at.tail,
            math.log(threshold) if threshold else -math.inf,
        )  # fmt: skip
    layout = torch.tensor([[n, v, at.block], [active.SPARSE, *OWN]], device="cpu")
    return state, argmax, Formed(marks, tails, layout, like.new_empty(0))


def active_gradients(
    head: Head,
    row_gradient: RowGradient,
    needs: tuple[bool, bool, bool],
    hidden_dtype: torch.dtype,
    at: Tiling,
    formed: Formed,
    workspace: int,
) -> Results:
    """Gradients of hidden (in `hidden_dtype`), weight and bias."""
    if not formed.marks.shape[0]:  # nothing was kept
        state, argmax, formed = active_form(head, row_gradient.target, 0, at)
        # That of forward may be of products that the vendor had rounded.
        norm = linear_ops.row_values(state, argmax, head.vocabulary, 0)[-1]
        row_gradient = row_gradient._replace(norm=norm.to(row_gradient.norm.dtype))
    n, v, block = formed.layout[0].tolist()
    at = replace(at, rows=n, columns=v, block=block)
    total = active_backward._Totals(head, row_gradient, needs, at)
    overflow = _add_items(total, row_gradient, formed, workspace)
    hidden, weight, bias = total.results(hidden_dtype)
    if syncfree.on():
        hidden, weight, bias = (syncfree.poisoned(overflow, g) for g in (hidden, weight, bias))
    return hidden, weight, bias


def _add_items(
    total: active_backward._Totals, row_gradient: RowGradient, formed: Formed, workspace: int
) -> Tensor:
    """Add tail and active columns to the sums; a flag that is set if they did not fit."""
    head, at = total.head, total.at
    n, block = at.rows, at.block
    total.add_tails(slice(0, n), slice(0, at.columns), formed.marks, formed.tails)
    padding = (0, -n % block)
    norm, coef, base = (F.pad(x, padding) for x in (total.norm, total.coef, total.base))
    # Of a store and its pairs.
    capacity = max(workspace // 2 // (block * head.hidden.element_size() + 16), block)
    overflow = torch.zeros((), dtype=torch.bool, device=head.hidden.device)
    for columns, count in _ranges(formed.marks, at.tail, capacity):
        items = Items.of(formed.marks[:, columns].contiguous(), count, block)
        weight, tiles = head.weight[columns], at.tails(columns)
        store = items.gradients(
            head.hidden, weight, head.bias_chunk(columns), head.transform, row_gradient.target,
            columns.start, norm, coef, base[tiles], at.tail, total.profile[columns],
        )  # fmt: skip
        if total.hidden is not None:
            items.add_to_hidden(store, weight, total.hidden.total)
        if total.weight is not None and total.wide_hidden is not None:
            common = total.base[tiles] @ total.wide_hidden
            items.weight_gradient(
                store, head.hidden, common, at.tail, total.profile[columns], total.weight[columns]
            )
        if total.bias is not None:
            _add_bias(total.bias[columns], store, items)
        overflow |= items.position[-1] > count
    return overflow


def _ranges(marks: Tensor, tail: int, capacity: int) -> Iterator[tuple[slice, int]]:
    """The vocabulary in ranges of whole tail tiles, and how many items each has room for.

    As many tiles as fit the capacity, but at least one. In sync-free mode all of them.
    """
    v = marks.shape[1]
    if syncfree.on():
        yield slice(0, v), min(capacity, marks.numel())
        return
    counts = F.pad(marks.sum(0, dtype=torch.int64), (0, -v % tail)).view(-1, tail).sum(1).tolist()
    first = held = 0
    for tile, count in enumerate(counts):
        if held and held + count > capacity:
            yield slice(first, tile * tail), held
            first, held = tile * tail, 0
        held += count
    yield slice(first, v), held


def _add_bias(bias: Tensor, store: Tensor, items: Items) -> None:
    """Add the sums of the items over their rows, each id in the order of the blocks."""
    number = torch.arange(items.capacity, device=store.device)
    sums = torch.where(number < items.starts[-1], store.sum(1, dtype=bias.dtype), 0.0)
    sum_segments(sums[:, None], items.pairs[:, 1], None, None, 1, bias[:, None], accumulate=True)
