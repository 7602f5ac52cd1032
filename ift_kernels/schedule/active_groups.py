"""Kept columns in groups that are multiplied at once, and blocks of rows that share a product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ift_kernels.backends.contract import ActiveColumns
from ift_kernels.backends.reference.active import bucket_counts

Counts = list[list[int]]  # of every block, part by part


class Blocks(NamedTuple):
    """Rows that share their active columns."""

    rows: int  # of a block
    columns: ActiveColumns
    counts: Counts


def unite(columns: ActiveColumns, together: int, bucket: int) -> ActiveColumns:
    """Blocks of `together` blocks each.

    Their tail gradients are left to `take_active`.
    """
    mask = columns.mask
    padded = F.pad(mask, (0, 0, 0, -len(mask) % together))
    mask = padded.view(-1, together, mask.shape[1]).amax(1)
    return ActiveColumns(mask, bucket_counts(mask, bucket), None)


def join(tiles: list[ActiveColumns], bucket: int) -> ActiveColumns:
    """All columns of tiles that follow each other, in buckets from the first one's on."""
    masks, counts, tails = zip(*tiles, strict=True)
    mask = cat(masks, 1)
    if any(of_tile.shape[1] % bucket for of_tile in masks[:-1]):
        return ActiveColumns(mask, bucket_counts(mask, bucket), None)
    there = [tail for tail in tails if tail is not None]
    tail = cat(there, 0) if len(there) == len(tiles) else None
    return ActiveColumns(mask, cat(counts, 1), tail)


def part_of(joined: ActiveColumns, columns: slice, bucket: int) -> ActiveColumns:
    """Some of the columns, in buckets from the first of them on."""
    mask = joined.mask[:, columns]
    at_end = columns.stop == joined.mask.shape[1]
    if columns.start % bucket or (columns.stop % bucket and not at_end):
        return ActiveColumns(mask, bucket_counts(mask, bucket), None)
    buckets = slice(columns.start // bucket, -(-columns.stop // bucket))
    tail = None if joined.tail_gradient is None else joined.tail_gradient[buckets]
    return ActiveColumns(mask, joined.counts[:, buckets], tail)


def cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """A copy, unless it is one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim)


def read(counts: list[Tensor]) -> list[Counts]:
    """The counts (blocks, parts) of all choices: all that a GPU waits for."""
    values: list[int] = cat([each.flatten() for each in counts], 0).tolist()
    found, start = [], 0
    for each in counts:
        size, parts = each.shape
        end = start + size * parts
        found.append([values[at : at + parts] for at in range(start, end, parts)])
        start = end
    return found


def ends_of(counts: Counts, limit: int, most: int) -> list[int]:
    """Where groups of parts end that have no more than `limit` active columns in a block.

    At most so many parts each, but at least one.
    """
    totals = [list(accumulate(row)) for row in counts]
    ends, start, parts = list[int](), 0, len(counts[0])
    for stop in range(1, parts + 1):
        if stop < parts and stop - start < most:
            with_next = (row[stop] - (row[start - 1] if start else 0) for row in totals)
            if max(with_next) <= limit:
                continue
        ends.append(stop)
        start = stop
    return ends


def of_groups(counts: Counts, ends: list[int]) -> Counts:
    """Active columns of every block, group by group; empty for ends of other columns."""
    if not ends or ends[-1] != len(counts[0]):
        return []
    starts = [0, *ends[:-1]]
    pairs = zip(starts, ends, strict=True)
    return [[sum(row[start:end]) for row in counts] for start, end in pairs]
