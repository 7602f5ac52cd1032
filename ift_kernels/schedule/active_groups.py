"""Kept columns in groups that are multiplied at once, and blocks of rows that share a product."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ift_kernels.backends.contract import ActiveColumns
from ift_kernels.backends.reference.active import bucket_counts

Counts = list[list[int]]  # of every block, part by part


class Blocks(NamedTuple):
    """Rows that share their active columns."""

    rows: int  # of a block
    columns: ActiveColumns
    counts: Counts


def unite(columns: ActiveColumns, together: int, part: int) -> ActiveColumns:
    """Blocks of `together` blocks each, counted in parts of so many columns.

    Their tail gradients are left to `take_active`.
    """
    mask = columns.mask
    padded = F.pad(mask, (0, 0, 0, -len(mask) % together))
    mask = padded.view(-1, together, mask.shape[1]).amax(1)
    return ActiveColumns(mask, bucket_counts(mask, part), None)


def read(choices: list[ActiveColumns]) -> list[Counts]:
    """The counts of all choices: all that a GPU waits for."""
    flat = [choice.counts.flatten() for choice in choices]
    values: list[int] = (flat[0] if len(flat) == 1 else torch.cat(flat)).tolist()
    found, start = [], 0
    for choice in choices:
        size, parts = choice.counts.shape
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
