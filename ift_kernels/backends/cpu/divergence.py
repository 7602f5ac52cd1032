"""The divergence of two heads in C++: csrc/cpu/isa/divergence.cpp. See reference/divergence.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends.contract import KINDS, Side
from ift_kernels.backends.cpu.extension import chunk, compiled
from ift_kernels.backends.layout_checks import check_rows, check_vectors
from ift_kernels.common.transform import LogitTransform


def divergence_terms(
    student: Side,
    teacher: Side,
    kind: str,
    beta: float,
    norm: Tensor,
    value: Tensor,
    centre: Tensor,
) -> None:
    _rows(student, teacher, norm, value, centre)
    compiled().divergence_terms(
        *_chunks(student, teacher), _record(kind, beta, norm, value, centre, None)
    )


def divergence_gradient_(
    student: Side,
    teacher: Side,
    kind: str,
    beta: float,
    norm: Tensor,
    centre: Tensor,
    upstream: Tensor,
    value: Tensor | None = None,
) -> None:
    upstream = upstream.float().contiguous()  # alive until the call returns
    _rows(student, teacher, norm, value, centre)
    check_vectors(student.x.shape[0], upstream)
    if value is not None and kind != "forward":
        raise RuntimeError(f"value: only of kind 'forward', got {kind!r}")
    compiled().divergence_gradient(
        *_chunks(student, teacher), _record(kind, beta, norm, value, centre, upstream)
    )


def transpose(x: Tensor, out: Tensor) -> None:
    check_rows(out, x.shape[0])
    if out.shape[0] != x.shape[1] or out.dtype != x.dtype or x.element_size() != 2:
        raise RuntimeError(f"transpose: {out.dtype} {tuple(out.shape)} for {tuple(x.shape)}")
    compiled().transpose(chunk(x, None, LogitTransform(), 0), out.data_ptr(), out.stride(0))


def _chunks(student: Side, teacher: Side) -> tuple[Any, Any]:
    return chunk(*student, 0), chunk(*teacher, 0)


def _rows(student: Side, teacher: Side, norm: Tensor, value: Tensor | None, centre: Tensor) -> None:
    count = student.x.shape[0]
    if teacher.x.shape != student.x.shape:
        raise RuntimeError(f"products {tuple(student.x.shape)} and {tuple(teacher.x.shape)}")
    if norm.shape != (2, 2, count) or norm.dtype != torch.float32 or not _packed(norm):
        raise RuntimeError(f"norm: {norm.dtype} {tuple(norm.shape)}, strides {norm.stride()}")
    check_vectors(count, value, centre)
    for sums in (value, centre):
        if sums is not None and sums.dtype != torch.float64:
            raise RuntimeError(f"expected float64 sums, got {sums.dtype}")


def _packed(norm: Tensor) -> bool:
    """Its four rows at equal distances, each of consecutive elements."""
    return norm.stride(0) == 2 * norm.stride(1) and (norm.stride(2) == 1 or norm.shape[2] <= 1)


def _record(
    kind: str,
    beta: float,
    norm: Tensor,
    value: Tensor | None,
    centre: Tensor,
    upstream: Tensor | None,
) -> Any:
    return compiled().DivergenceRows(
        KINDS.index(kind),
        beta,
        norm.data_ptr(),
        norm.stride(1),
        0 if value is None else value.data_ptr(),
        centre.data_ptr(),
        0 if upstream is None else upstream.data_ptr(),
    )
