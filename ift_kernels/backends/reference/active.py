"""The epilogues of the active set in plain torch: the executable specification.

A *block* is `block` consecutive rows. Its *active mask* says which columns matter to it; the others
are its *tail*, summed over *buckets* of consecutive ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ift_kernels.backends.contract import ActiveColumns, Chunk, RowGradient, TakenColumns
from ift_kernels.backends.reference.chunk import logits, target_columns
from ift_kernels.backends.reference.dlogits import dlogits_

PADDING = 32  # the active columns of a block are rounded up to this


def mark_active(
    chunk: Chunk,
    row_gradient: RowGradient,
    log_threshold: float,
    block: int,
    bucket: int,
    tail_weights: Tensor | None,
) -> ActiveColumns:
    """A column is active in a block where one of its rows has it as target, or a logit that is not
    ≤ the row's log-sum-exp + `log_threshold`.

    A NaN is not ≤ anything, so it is never lost. Ids that a bias of −inf masks out are marked too:
    their gradient is 0, not the mean of a tail that they have no part in.

    The tail gradient (buckets, N): the sum over the columns of a bucket that are not active of what
    `dlogits_` would make of the products, over that of their `tail_weights` (C,), float32; 0
    without any. It may be left to `take_active`, as it is where there are no `tail_weights`.
    """
    target, norm, _ = row_gradient
    z, level = logits(chunk), norm.sum(0) + log_threshold
    above = ~(z <= level[:, None])
    if chunk.bias is not None:
        above |= chunk.bias == -torch.inf
    rows, columns = above.shape
    inside, local = target_columns(chunk, target)
    above[inside.nonzero()[:, 0], local[inside]] = True
    mask = F.pad(above, (0, 0, 0, -rows % block)).view(-1, block, columns).any(1).to(torch.uint8)
    tail = None
    if tail_weights is not None:
        tail = tail_sums(_gradients(chunk, row_gradient), mask, block, bucket, tail_weights)
    return ActiveColumns(mask, bucket_counts(mask, bucket), tail)


def bucket_counts(mask: Tensor, bucket: int) -> Tensor:
    """int32 (blocks, buckets): active columns of each bucket of each block."""
    missing = -mask.shape[1] % bucket
    padded = F.pad(mask, (0, missing)) if missing else mask
    return padded.view(len(mask), -1, bucket).sum(2, dtype=torch.int32)


def _gradients(chunk: Chunk, row_gradient: RowGradient) -> Tensor:
    """What `dlogits_` makes of products, in the dtype of sums: nothing is stored that rounds it."""
    wide = torch.float64 if chunk.x.dtype == torch.float64 else torch.float32
    copied = chunk._replace(x=chunk.x.to(wide, copy=True))
    dlogits_(copied, row_gradient)
    return copied.x


def tail_sums(dz: Tensor, mask: Tensor, block: int, bucket: int, tail_weights: Tensor) -> Tensor:
    """The tail gradient of a tile of gradients."""
    rows, columns = dz.shape
    wide = torch.float64 if dz.dtype == torch.float64 else torch.float32
    tail = (mask == 0).repeat_interleave(block, 0)[:rows]
    zero = torch.zeros((), dtype=wide, device=dz.device)
    parts = (torch.where(tail, x.to(wide), zero) for x in (dz, tail_weights))
    total, weight = (F.pad(x, (0, -columns % bucket)).view(rows, -1, bucket).sum(2) for x in parts)
    return torch.where(weight == 0, zero, total / weight).T.contiguous()


def take_active(
    chunk: Chunk,
    columns: ActiveColumns,
    block: int,
    bucket: int,
    tail_weights: Tensor,
    active: Tensor,
    counts: Sequence[int],
    row_gradient: RowGradient | None = None,
) -> TakenColumns:
    """Copy the active columns of a tile of gradients (N, C) for dh.

    With a `row_gradient` the chunk has products, of which `dlogits_` would make these gradients;
    they may be overwritten. A tail gradient that `columns` lacks is formed.

    `active`, flat, receives each block's active columns, less their weight times the tail gradient
    of their bucket, as (block, their number rounded up to 32), zeros beyond, one block after
    another; rows beyond N stay as they are. `counts`: their numbers, as the host has them.
    """
    mask, _, tail = columns
    dz = chunk.x if row_gradient is None else _gradients(chunk, row_gradient)
    if tail is None:
        tail = tail_sums(dz, mask, block, bucket, tail_weights)
    written, rows = 0, len(dz)
    for number, of_block in enumerate(mask):
        ids = of_block.nonzero()[:, 0]
        width = -(-len(ids) // PADDING) * PADDING
        block_rows = slice(number * block, min(rows, (number + 1) * block))
        out = active[written : written + block * width].view(block, width)
        out = out[: block_rows.stop - block_rows.start]
        of_tail = tail.T[block_rows][:, ids // bucket] * tail_weights[ids]
        out[:, : len(ids)] = dz[block_rows][:, ids].to(tail.dtype) - of_tail
        out[:, len(ids) :] = 0
        written += block * width
    of_blocks = columns.counts.sum(1, dtype=torch.int32)
    return TakenColumns(mask.nonzero()[:, 1], of_blocks, tail)


def bucket_sums(matrix: Tensor, bucket: int, tail_weights: Tensor) -> Tensor:
    """``Σ tail_weights[v]·matrix[v]`` over every `bucket` rows, (buckets, D), at least float32."""
    parts = zip(matrix.split(bucket), tail_weights.split(bucket), strict=True)
    return torch.stack([q @ rows.to(q.dtype) for rows, q in parts])
