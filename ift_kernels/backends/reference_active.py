"""The epilogues of the active set in plain torch: the executable specification, see reference.py.

A *block* is `block` consecutive rows. Columns of a block that matter are *marked*; their products
are stored as columns of `block` elements, block after block with ids ascending, which is the order
of ``marks.nonzero()``. What is not marked is the *tail*, of which each row keeps sums per *tile* of
the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ift_kernels.backends import reference as ref
from ift_kernels.transform import LogitTransform


def active_marks(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    level: Tensor,
    block: int,
) -> Tensor:
    """uint8 (blocks, C): 1 where a row of the block has a logit not ≤ its `level`, or its target.

    A NaN is not ≤ anything, so it is never lost. Ids that a bias of −inf masks out are marked too:
    their gradient is 0, not the mean of a tail that they have no part in.
    """
    above = ~(ref._logits(x, bias, transform) <= level[:, None])
    if bias is not None:
        above |= bias == -torch.inf
    rows, columns = x.shape
    inside, local = ref._hit(target, offset, columns)
    above[inside.nonzero()[:, 0], local[inside]] = True
    return F.pad(above, (0, 0, 0, -rows % block)).view(-1, block, columns).any(1).to(torch.uint8)


def active_collect(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    marks: Tensor,
    reference: Tensor,
    tile: int,
    store: Tensor,
    sums: Tensor,
) -> None:
    """Fill `store` (marked, block) and `sums` (3, tiles, N), both written completely.

    With e = exp(z − reference) and s the derivative of the softcap (1 without one), the sums over
    the columns of a tile that are not marked are Σ e·s, Σ e·(z − reference)·s and Σ s.
    """
    z = ref._logits(x, bias, transform)
    rows, columns = z.shape
    block = store.shape[1]
    tail = (marks == 0).repeat_interleave(block, 0)[:rows]
    centred = z - reference.to(z.dtype)[:, None]
    slope: Tensor | float = 1.0
    if transform.softcap:
        slope = 1.0 - (z * (transform.temperature / transform.softcap)).square()
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    e = torch.where(tail, centred.exp() * slope, zero)
    parts = e, torch.where(e == 0, zero, e * centred), torch.where(tail, slope, zero)
    for which, part in enumerate(parts):
        padded = F.pad(part, (0, -columns % tile)).view(rows, -1, tile)
        sums[which].copy_(padded.sum(2, dtype=sums.dtype).T)
    blocks = F.pad(x, (0, 0, 0, -rows % block)).view(-1, block, columns)
    number, column = marks.nonzero().T
    store.copy_(blocks[number, :, column])


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
    """Overwrite stored products with their gradient, as `dlogits_`, less that of their tail.

    Which is `base` of tile and row times `profile` (columns,), float32, of the column.

    `pairs` (marked, 2) is ``marks.nonzero()``, or that of several tiles one after another; norm,
    coef (…, padded N) and base (tiles, padded N) come in whole blocks, coef 0 beyond `rows`.
    `row_major`, flat, receives each block as (block, its columns rounded up to 32, zeros beyond),
    one after another.
    """
    number, column = pairs.T
    block = store.shape[1]
    at = number[:, None] * block + torch.arange(block, device=store.device)  # (marked, block)
    z = ref._logits(store.T, None if bias is None else bias[column], transform).T
    hit, one, per_log_p, flat = coef.to(z.dtype)[:, at]
    log_p = (z - norm[0].to(z.dtype)[at]) - norm[1].to(z.dtype)[at]
    p = log_p.exp()
    grad = p * (one + per_log_p * torch.where(p == 0, 0.0, log_p)) + flat
    target = F.pad(target, (0, norm.shape[1] - target.shape[0]), value=-1)
    grad = grad + torch.where(target[at] - offset == column[:, None], hit, 0.0)
    tail = base.to(z.dtype)[(column // tile)[:, None], at] * profile[column][:, None]
    grad = grad * transform.derivative(z) - tail
    store.copy_(torch.where((coef == 0).all(0)[at], 0.0, grad))
    if row_major is None:
        return
    written = 0
    for some in number.unique():
        of_block = store[number == some].T
        count = of_block.shape[1]
        width = -(-count // 32) * 32
        out = row_major[written : written + block * width].view(block, width)
        out[:, :count] = of_block
        out[:, count:] = 0
        written += block * width


def active_rows(
    dz: Tensor,
    marks: Tensor,
    block: int,
    tile: int,
    profile: Tensor,
    mean: Tensor,
    active: Tensor,
) -> None:
    """Take a tile of gradients (N, C) apart, for dh: both results are written completely.

    `mean` (tiles, N): the sum of each row over the columns of a tile that are not marked, over that
    of their `profile` (C,), float32; 0 without any. `active`, flat, receives each block's marked
    columns, less their profile times that of their tile, as (block, their number rounded up to 32),
    zeros beyond, one after another; rows beyond N stay as they are.
    """
    rows, columns = dz.shape
    tail = (marks == 0).repeat_interleave(block, 0)[:rows]
    zero = torch.zeros((), dtype=mean.dtype, device=dz.device)
    parts = (torch.where(tail, x.to(mean.dtype), zero) for x in (dz, profile))
    total, spread = (F.pad(x, (0, -columns % tile)).view(rows, -1, tile).sum(2) for x in parts)
    mean.copy_(torch.where(spread == 0, zero, total / spread).T)
    written = 0
    for number, marked in enumerate(marks):
        ids = marked.nonzero()[:, 0]
        width = -(-len(ids) // 32) * 32
        here = slice(number * block, min(rows, (number + 1) * block))
        out = active[written : written + block * width].view(block, width)
        out = out[: here.stop - here.start]
        of_tail = mean.T[here][:, ids // tile] * profile[ids]
        out[:, : len(ids)] = dz[here][:, ids].to(mean.dtype) - of_tail
        out[:, len(ids) :] = 0
        written += block * width


def combine_rows(
    parts: Tensor,
    at: Tensor,
    common: Tensor,
    tile: int,
    profile: Tensor,
    out: Tensor,
    accumulate: bool,
) -> None:
    """``out[v] = common[v // tile]·profile[v] + Σ parts[at == v]``, plus `out` if `accumulate`."""
    total = common.repeat_interleave(tile, 0)[: out.shape[0]] * profile[:, None]
    total.index_add_(0, at, parts.to(total.dtype))
    out.copy_(total + out if accumulate else total)


def tile_sums(matrix: Tensor, tile: int, profile: Tensor) -> Tensor:
    """``Σ profile[v] * matrix[v]`` over every `tile` rows, (tiles, D), at least float32."""
    parts = zip(matrix.split(tile), profile.split(tile), strict=True)
    return torch.stack([q @ rows.to(q.dtype) for rows, q in parts])
