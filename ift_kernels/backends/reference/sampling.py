"""The k best logits so far, and Gumbel-max draws."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.reference.chunk import logits


def top_k_update(chunk: Chunk, values: Tensor, ids: Tensor) -> None:
    """Update the k best logits so far with one chunk, in place.

    `values` float32 (N, k), descending, starts at −inf and `ids` at −1; chunks come in order of
    `offset`, the first at 0 and at least k wide.
    """
    z, offset = logits(chunk).to(values.dtype), chunk.offset
    columns = torch.arange(offset, offset + z.shape[1], device=z.device).expand_as(z)
    # The −inf placeholders of the first call (ids −1) must lose against tokens at −inf.
    parts = [(values, ids), (z, columns)] if offset else [(z, columns), (values, ids)]
    both, both_ids = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    # A stable sort keeps the earlier of two equal logits first, and earlier here is the lower id.
    order = both.sort(dim=1, descending=True, stable=True).indices[:, : values.shape[1]]
    values.copy_(both.gather(1, order))
    ids.copy_(both_ids.gather(1, order))


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
