"""The k best logits so far, and Gumbel-max draws."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.reference.chunk import logits

_NOTHING = -(2**63)  # the key of a placeholder
_KEYS = 4096  # columns whose keys, of 8 bytes, are formed at once


def top_k_update(chunk: Chunk, values: Tensor, ids: Tensor) -> None:
    """Update the k best logits so far with one chunk, in place.

    `values` float32 (N, k), descending, starts at −inf and `ids` at −1; chunks come in order of
    `offset`, the first at 0. Of equal logits the lower id is ahead; NaN is ahead of all.
    """
    for start in range(0, chunk.x.shape[1], _KEYS):
        some = slice(start, start + _KEYS)
        bias = None if chunk.bias is None else chunk.bias[some]
        part = chunk._replace(x=chunk.x[:, some], bias=bias, offset=chunk.offset + start)
        z = logits(part).to(values.dtype)
        columns = torch.arange(part.offset, part.offset + z.shape[1], device=z.device)
        merge_top_k(values, ids, z, columns.expand_as(z))


def merge_top_k(values: Tensor, ids: Tensor, z: Tensor, columns: Tensor) -> None:
    """Update the k best with logits (N, C) of `columns`: higher ids, or negative for none."""
    k = values.shape[1]
    if values.dtype == torch.float32:
        keys = torch.cat([_keys(values, ids), _keys(z, columns)], 1).topk(k).values
        ordered = (keys >> 32).int()
        bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
        empty = keys == _NOTHING
        values.copy_(bits.view(torch.float32).masked_fill(empty, -torch.inf))
        ids.copy_(((keys & 0x7FFFFFFF) ^ 0x7FFFFFFF).masked_fill(empty, -1))
        return
    both, both_ids = torch.cat([values, z], 1), torch.cat([ids, columns], 1)
    # Stable sorts keep the earlier of two equal logits first; placeholders lose even at −inf.
    order = both.sort(dim=1, descending=True, stable=True).indices
    last = (both_ids.gather(1, order) < 0).byte().sort(dim=1, stable=True).indices
    order = order.gather(1, last)[:, :k]
    values.copy_(both.gather(1, order))
    ids.copy_(both_ids.gather(1, order))


def _keys(z: Tensor, ids: Tensor) -> Tensor:
    """int64 that orders by a float32 logit, then by lowest id; a NaN is above all, −0 equals 0."""
    bits = (z + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(z.isnan(), 0x7FFFFFFF)
    return ((ordered.long() << 32) | (ids ^ 0x7FFFFFFF)).masked_fill(ids < 0, _NOTHING)


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b  # wraps modulo 2⁶⁴, which keeps all 64 bits of a 32×32-bit product
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox(seed: int, row: Tensor, ids: Tensor) -> Tensor:
    """Philox4x32-10 bits, one 32-bit word (as int64) per (row, vocabulary id).

    Counter (id // 4, row low, row high, 0), key (seed low, seed high), word id % 4.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    row, ids = torch.broadcast_tensors(row, ids)
    c0, c1, c2, c3 = ids // 4, row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, torch.zeros_like(row)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        hi0, lo0 = _mulhilo(c0, 0xD2511F53)
        hi1, lo1 = _mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack([c0, c1, c2, c3])
    return words.gather(0, (ids % 4)[None])[0]


def gumbel_update(
    chunk: Chunk, seed: int, rows: Tensor, best: Tensor, logit: Tensor, ids: Tensor
) -> None:
    """Update a Gumbel-max draw with one chunk: `best` perturbed logit, its logit and id, in place.

    `rows` (N,) are the global row numbers that key the generator.
    """
    z, offset = logits(chunk), chunk.offset
    columns = torch.arange(offset, offset + z.shape[1], device=z.device)
    bits = philox(seed, rows[:, None], columns[None, :])
    # −log1p(−u) of a small u keeps its digits: the largest perturbation is 22.9, not 16.6.
    u = (bits.to(z.dtype) + 0.5) * 2.0**-32
    score = z - torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    top, column = score.max(dim=1)
    is_new_max = (top > best) | (top.isnan() & ~best.isnan())
    best.copy_(torch.where(is_new_max, top, best))
    logit.copy_(torch.where(is_new_max, z.gather(1, column[:, None])[:, 0], logit))
    ids.copy_(torch.where(is_new_max, column + offset, ids))
