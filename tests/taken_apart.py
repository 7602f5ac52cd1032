"""Gradients and marks for `active_rows` of backends for GPUs, and where it writes."""

import torch

UNTOUCHED = 7.0  # what stands where nothing is to be written


def example(rows, columns, dtype, block, tile, start=0, gap=5):
    """A tile of gradients, rows `gap` elements apart from `start` on, and its marks.

    Blocks by turns have a few columns, none and all of them; a second tile of the first block has
    all. Rows 1 and 2 have a NaN in the first tile: where nothing is marked, and in a marked column.
    """
    generator = torch.Generator().manual_seed(rows + columns)
    storage = torch.full((start + rows * (columns + gap),), torch.nan, dtype=dtype)
    dz = storage[start:].view(rows, columns + gap)[:, :columns]
    dz.copy_(torch.randn(rows, columns, generator=generator) + 0.3)
    marks = torch.rand(-(-rows // block), columns, generator=generator) < 0.2
    marks[1::3], marks[2::3] = False, True
    marks[0, tile : 2 * tile] = True
    marks[0, :2] = torch.tensor([False, True])
    dz[1, 0] = dz[2, 1] = torch.nan
    return dz, marks.to(torch.uint8)


def profile(columns):
    """How the tail is spread: what differs from id to id, 0 for some."""
    values = torch.rand(columns, generator=torch.Generator().manual_seed(columns)) + 0.1
    values[::5] = 0
    return values


def outputs(dz, marks, block, tile):
    """Where `active_rows` writes: the means, and room for the active columns and a few more."""
    widths = (marks.sum(1) + 31) // 32 * 32
    mean = torch.full((-(-dz.shape[1] // tile), len(dz)), UNTOUCHED)
    return mean, torch.full((block * int(widths.sum()) + 40,), UNTOUCHED, dtype=dz.dtype)


def close(ours, theirs, dtype):
    """Two pairs of results: means to float32's rounding, columns to that of their dtype."""
    for a, b, eps in zip(ours, theirs, (1e-6, torch.finfo(dtype).eps), strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=max(eps, 1e-6), atol=2e-6, equal_nan=True
        )
