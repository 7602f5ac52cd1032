"""The epilogues of the active set in plain torch: the executable specification.

A *block* is `block` consecutive rows. Its *active mask* says which columns matter to it; the others
are its *tail*, summed over *buckets* of consecutive ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient
from ift_kernels.backends.reference.chunk import logits, target_columns
from ift_kernels.backends.reference.dlogits import dlogits_


def active_mask(chunk: Chunk, target: Tensor, level: Tensor, block: int) -> Tensor:
    """uint8 (blocks, C): 1 where a row of the block has a logit not ≤ its `level`, or its target.

    A NaN is not ≤ anything, so it is never lost. Ids that a bias of −inf masks out are marked too:
    their gradient is 0, not the mean of a tail that they have no part in.
    """
    above = ~(logits(chunk) <= level[:, None])
    if chunk.bias is not None:
        above |= chunk.bias == -torch.inf
    rows, columns = above.shape
    inside, local = target_columns(chunk, target)
    above[inside.nonzero()[:, 0], local[inside]] = True
    return F.pad(above, (0, 0, 0, -rows % block)).view(-1, block, columns).any(1).to(torch.uint8)


def split_active(
    chunk: Chunk,
    mask: Tensor,
    block: int,
    bucket: int,
    tail_weights: Tensor,
    tail_gradient: Tensor,
    active: Tensor,
    row_gradient: RowGradient | None = None,
) -> None:
    """Split a tile of gradients (N, C) for dh; both results are written completely.

    With a `row_gradient` the chunk has products, of which `dlogits_` would make these gradients;
    they may be overwritten.

    `tail_gradient` (buckets, N): the sum of each row over the columns of a bucket that are not
    active, over that of their `tail_weights` (C,), float32; 0 without any. `active`, flat, receives
    each block's active columns, less their weight times the tail gradient of their bucket, as
    (block, their number rounded up to 32), zeros beyond, one block after another; rows beyond N
    stay as they are.
    """
    if row_gradient is not None:  # in the dtype of sums: nothing is stored that could round them
        chunk = chunk._replace(x=chunk.x.to(tail_gradient.dtype, copy=True))
        dlogits_(chunk, row_gradient)
    dz, (rows, columns) = chunk.x, chunk.x.shape
    tail = (mask == 0).repeat_interleave(block, 0)[:rows]
    zero = torch.zeros((), dtype=tail_gradient.dtype, device=dz.device)
    parts = (torch.where(tail, x.to(zero.dtype), zero) for x in (dz, tail_weights))
    total, weight = (F.pad(x, (0, -columns % bucket)).view(rows, -1, bucket).sum(2) for x in parts)
    tail_gradient.copy_(torch.where(weight == 0, zero, total / weight).T)
    written = 0
    for number, of_block in enumerate(mask):
        ids = of_block.nonzero()[:, 0]
        width = -(-len(ids) // 32) * 32
        block_rows = slice(number * block, min(rows, (number + 1) * block))
        out = active[written : written + block * width].view(block, width)
        out = out[: block_rows.stop - block_rows.start]
        of_tail = tail_gradient.T[block_rows][:, ids // bucket] * tail_weights[ids]
        out[:, : len(ids)] = dz[block_rows][:, ids].to(zero.dtype) - of_tail
        out[:, len(ids) :] = 0
        written += block * width


def bucket_sums(matrix: Tensor, bucket: int, tail_weights: Tensor) -> Tensor:
    """``Σ tail_weights[v]·matrix[v]`` over every `bucket` rows, (buckets, D), at least float32."""
    parts = zip(matrix.split(bucket), tail_weights.split(bucket), strict=True)
    return torch.stack([q @ rows.to(q.dtype) for rows, q in parts])
