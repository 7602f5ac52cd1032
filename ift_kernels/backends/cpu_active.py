"""The epilogues of the active set in C++: csrc/cpu/isa/active.cpp. See reference_active.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends import cpu, reference_active
from ift_kernels.transform import LogitTransform

PLAIN = LogitTransform()  # of gradients, which are no logits any more


def collected(
    x: Tensor, marks: Tensor, reference: Tensor, tile: int, store: Tensor, sums: Tensor
) -> tuple[int, int, int]:
    """Blocks, tail tiles and block of an `active_collect`, once its tensors are checked."""
    cpu.vectors(x.shape[0], reference)
    blocks, tiles, block = -(-x.shape[0] // store.shape[1]), -(-x.shape[1] // tile), store.shape[1]
    if marks.shape != (blocks, x.shape[1]) or not marks.is_contiguous():
        raise RuntimeError(f"marks: {tuple(marks.shape)} for {tuple(x.shape)}, blocks of {block}")
    if not store.is_contiguous() or store.dtype != x.dtype or block % 32:
        raise RuntimeError(f"store: {store.dtype} {tuple(store.shape)}")
    if sums.shape != (3, tiles, x.shape[0]) or sums.dtype != torch.float32:
        raise RuntimeError(f"sums: {sums.dtype} {tuple(sums.shape)}")
    return blocks, tiles, block


def check_profile(profile: Tensor, columns: int) -> None:
    """A RuntimeError unless it is one float32 number per column."""
    right = profile.shape == (columns,) and profile.dtype == torch.float32
    if not right or not profile.is_contiguous():
        raise RuntimeError(f"profile: {profile.dtype} {tuple(profile.shape)}, expected {columns}")


def stored(
    store: Tensor,
    pairs: Tensor,
    rows: int,
    bias: Tensor | None,
    target: Tensor,
    norm: Tensor,
    coef: Tensor,
    base: Tensor,
    profile: Tensor,
) -> int:
    """The block of an `active_gradient_`, once its tensors are checked."""
    block, padded = store.shape[1], -(-rows // store.shape[1]) * store.shape[1]
    for matrix in (norm, coef, base):
        cpu.rows(matrix, padded)
        if matrix.dtype != torch.float32:
            raise RuntimeError(f"expected float32 rows, got {matrix.dtype}")
    cpu.vectors(rows, target)
    check_profile(profile, profile.numel())
    if bias is not None and not bias.is_contiguous():
        raise RuntimeError("bias: expected contiguous")
    if pairs.shape != (store.shape[0], 2) or not pairs.is_contiguous() or block % 32:
        raise RuntimeError(f"pairs: {tuple(pairs.shape)} for a store of {tuple(store.shape)}")
    return block


def taken_apart(
    dz: Tensor,
    marks: Tensor,
    block: int,
    tile: int,
    profile: Tensor,
    mean: Tensor,
    active: Tensor,
) -> tuple[int, int]:
    """Blocks and tail tiles of an `active_rows`, once its tensors are checked."""
    (rows, columns), blocks, tiles = dz.shape, -(-dz.shape[0] // block), -(-dz.shape[1] // tile)
    check_profile(profile, columns)
    if marks.shape != (blocks, columns) or not marks.is_contiguous() or block % 32:
        raise RuntimeError(f"marks: {tuple(marks.shape)} for {tuple(dz.shape)}, blocks of {block}")
    if mean.shape != (tiles, rows) or mean.dtype != torch.float32 or not mean.is_contiguous():
        raise RuntimeError(f"mean: {mean.dtype} {tuple(mean.shape)}, strides {mean.stride()}")
    if active.dtype != dz.dtype or not active.is_contiguous():
        raise RuntimeError(f"active: {active.dtype}, strides {active.stride()}, for {dz.dtype}")
    return blocks, tiles


def active_marks(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    level: Tensor,
    block: int,
) -> Tensor:
    level = level.float()
    cpu.vectors(x.shape[0], target, level)
    marks = x.new_empty((-(-x.shape[0] // block), x.shape[1]), dtype=torch.uint8)
    chunk = cpu.chunk(x, bias, transform, offset)
    cpu.extension().active_marks(
        chunk, target.data_ptr(), level.data_ptr(), block, marks.data_ptr()
    )
    return marks


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
    reference = reference.float()
    _, _, block = collected(x, marks, reference, tile, store, sums)
    out = sums.contiguous()
    cpu.extension().active_collect(
        cpu.chunk(x, bias, transform, 0),
        marks.data_ptr(),
        reference.data_ptr(),
        block,
        tile,
        store.data_ptr(),
        out.data_ptr(),
        x.shape[0],
    )
    if out is not sums:
        sums.copy_(out)


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
    block = stored(store, pairs, rows, bias, target, norm, coef, base, profile)
    if row_major is not None and not row_major.is_contiguous():
        raise RuntimeError("row_major: expected contiguous")
    cpu.extension().active_gradient(
        cpu.chunk(store, None, transform, offset, rows, bias),
        target.data_ptr(),
        norm.data_ptr(),
        norm.stride(0),
        coef.data_ptr(),
        coef.stride(0),
        base.data_ptr(),
        base.stride(0),
        profile.data_ptr(),
        pairs.data_ptr(),
        store.shape[0],
        block,
        tile,
        0 if row_major is None else row_major.data_ptr(),
    )


def active_rows(
    dz: Tensor,
    marks: Tensor,
    block: int,
    tile: int,
    profile: Tensor,
    mean: Tensor,
    active: Tensor,
) -> None:
    taken_apart(dz, marks, block, tile, profile, mean, active)
    cpu.extension().active_rows(
        cpu.chunk(dz, None, PLAIN, 0),
        marks.data_ptr(),
        block,
        tile,
        profile.data_ptr(),
        mean.data_ptr(),
        active.data_ptr(),
        active.numel(),
    )


def combine_rows(
    parts: Tensor,
    at: Tensor,
    common: Tensor,
    tile: int,
    profile: Tensor,
    out: Tensor,
    accumulate: bool,
) -> None:
    if out.dtype not in cpu.DTYPES or not out.is_contiguous():
        return reference_active.combine_rows(parts, at, common, tile, profile, out, accumulate)
    columns, width = out.shape
    cpu.vectors(parts.shape[0], at)
    check_profile(profile, columns)
    if not (parts.is_contiguous() and common.is_contiguous()) or common.dtype != torch.float32:
        raise RuntimeError("parts, common: expected contiguous, common in float32")
    if parts.shape[1] != width or common.shape != (-(-columns // tile), width):
        raise RuntimeError(f"common: {tuple(common.shape)} for {tuple(out.shape)}")
    cpu.extension().combine_rows(
        cpu.DTYPES[parts.dtype],
        parts.data_ptr(),
        parts.shape[0],
        width,
        at.data_ptr(),
        common.data_ptr(),
        tile,
        profile.data_ptr(),
        columns,
        cpu.DTYPES[out.dtype],
        out.data_ptr(),
        accumulate,
        torch.get_num_threads(),
    )


def tile_sums(matrix: Tensor, tile: int, profile: Tensor) -> Tensor:
    if matrix.dtype not in cpu.DTYPES or matrix.stride(1) != 1:
        return reference_active.tile_sums(matrix, tile, profile)
    count, width = matrix.shape
    check_profile(profile, count)
    sums = matrix.new_empty((-(-count // tile), width), dtype=torch.float32)
    cpu.extension().tile_sums(
        cpu.DTYPES[matrix.dtype],
        matrix.data_ptr(),
        count,
        width,
        matrix.stride(0),
        tile,
        profile.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums
