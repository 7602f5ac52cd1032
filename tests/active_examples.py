"""Gradients and active masks for `take_active` of backends for GPUs, and its outputs."""

import pytest
import torch

from ift_kernels.backends import reference
from ift_kernels.backends.contract import ActiveColumns, Chunk, RowGradient
from ift_kernels.backends.reference.active import bucket_counts
from ift_kernels.backends.reference.chunk import target_columns

UNTOUCHED = 7.0  # where nothing is to be written


def example(rows, columns, dtype, block, bucket, start=0, gap=5):
    """A tile of gradients, rows `gap` elements apart from `start` on, and its active mask.

    Blocks by turns have a few columns, none and all of them; a second bucket of the first block has
    all. Rows 1 and 2 have a NaN in the first bucket: in its tail, and in an active column.
    """
    generator = torch.Generator().manual_seed(rows + columns)
    storage = torch.full((start + rows * (columns + gap),), torch.nan, dtype=dtype)
    dz = storage[start:].view(rows, columns + gap)[:, :columns]
    dz.copy_(torch.randn(rows, columns, generator=generator) + 0.3)
    mask = torch.rand(-(-rows // block), columns, generator=generator) < 0.2
    mask[1::3], mask[2::3] = False, True
    mask[0, bucket : 2 * bucket] = True
    mask[0, :2] = torch.tensor([False, True])
    dz[1, 0] = dz[2, 1] = torch.nan
    return dz, mask.to(torch.uint8)


def tail_weights(columns):
    """They differ from id to id, 0 for some."""
    values = torch.rand(columns, generator=torch.Generator().manual_seed(columns)) + 0.1
    values[::5] = 0
    return values


def space(dz, mask, block):
    """For the active columns and a few more."""
    widths = (mask.sum(1) + 31) // 32 * 32
    return torch.full((block * int(widths.sum()) + 40,), UNTOUCHED, dtype=dz.dtype)


def take(backend, chunk, mask, block, bucket, weights, of=None, tail=None):
    """Tail gradient, active columns, their ids and numbers."""
    active = space(chunk.x, mask, block)
    columns = ActiveColumns(mask, bucket_counts(mask, bucket), tail)
    counts = mask.sum(1).tolist()
    taken = backend.take_active(chunk, columns, block, bucket, weights, active, counts, of)
    return taken.tail_gradient, active, taken.ids, taken.counts


def row_gradient(rows, columns, offset):
    """Of products about 1 in size: targets inside and outside; row 3 without any coefficient."""
    generator = torch.Generator().manual_seed(rows)
    target = torch.randint(offset - columns, offset + 2 * columns, (rows,), generator=generator)
    target[0] = offset + columns - 1
    norm = torch.stack([torch.full((rows,), 2.0), torch.full((rows,), 1.5)])
    coef = torch.randn(4, rows, generator=generator)
    coef[:, 3::17] = 0
    return RowGradient(target, norm, coef)


def assert_same(backend, chunk, mask, block, bucket, weights, of=None, rounded=False):
    """`take_active` of a backend is that of the reference, to rounding: of tail gradients in
    float32, of columns in their dtype; `rounded`: gradients `of` rows are stored in it first."""
    eps = torch.finfo(chunk.x.dtype).eps
    if of is not None:  # targets are active
        inside, local = target_columns(chunk, of.target)
        mask[(inside.nonzero()[:, 0] // block), local[inside]] = 1
    found = [  # which may overwrite the chunk
        take(side, chunk._replace(x=clone(chunk.x)), mask, block, bucket, weights, of)
        for side in (reference, backend)
    ]
    assert all(map(torch.equal, found[0][2:], found[1][2:]))
    tolerances = (4e-6 if of else 1e-6, 2 * eps if of else eps)
    if rounded:  # and an exponential of a logit up to 28 has its rounding so many times
        tolerances = (max(4 * eps, 4e-5), max(2 * eps, 4e-5))
    for b, a, rtol in zip(*(side[:2] for side in found), tolerances, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=max(rtol, 1e-6), atol=max(2e-6, 2 * rtol * bool(of)),
            equal_nan=True,
        )  # fmt: skip


def clone(x):
    """As far from 16 bytes, and with rows as far apart."""
    storage = x.new_empty(x.storage_offset() + len(x) * x.stride(0))
    copied = storage[x.storage_offset() :].view(len(x), -1)[:, : x.shape[1]]
    return copied.copy_(x)


REFUSED = (
    ("mask", lambda t: t[:2], "mask"),
    ("active", torch.Tensor.half, "active"),
    ("active", lambda t: t[::2], "active"),
)


def assert_refuses_other_layouts(backend, block_of_40, *more):
    """Each change of an argument, and blocks of 40 rows, with an error that says so."""
    dz, mask = example(70, 200, torch.float32, 32, 64)
    given = {"chunk": Chunk(dz), "mask": mask, "tail_weights": tail_weights(200)}
    given |= {"active": space(dz, mask, 32), "tail": torch.zeros(4, 70)}

    def call(chunk, mask, tail_weights, active, tail, block=32):
        columns = ActiveColumns(mask, bucket_counts(mask, 64), tail)
        backend.take_active(chunk, columns, block, 64, tail_weights, active, mask.sum(1).tolist())

    for name, change, said in (*REFUSED, *more):
        with pytest.raises(RuntimeError, match=said):
            call(**given | {name: change(given[name])})
    with pytest.raises(RuntimeError, match=block_of_40):
        call(**given | {"mask": mask[:2]}, block=40)
