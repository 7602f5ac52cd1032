"""The divergence of two heads in C++: csrc/cpu/isa/divergence.cpp. See reference/divergence.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ift_kernels.backends.contract import KINDS, Chunk
from ift_kernels.backends.cpu.extension import compiled, products_of
from ift_kernels.backends.layout_checks import address, check_divergence_args, check_rows


def divergence_terms(
    student: Chunk,
    teacher: Chunk,
    kind: str,
    beta: float,
    norm: Tensor,
    value: Tensor,
    centre: Tensor,
) -> None:
    compiled().divergence_terms(*_arguments(student, teacher, kind, beta, norm, value, centre))


def divergence_gradient_(
    student: Chunk,
    teacher: Chunk,
    kind: str,
    beta: float,
    norm: Tensor,
    centre: Tensor,
    upstream: Tensor,
    value: Tensor | None = None,
) -> None:
    if value is not None and kind != "forward":
        raise RuntimeError(f"value: only of kind 'forward', got {kind!r}")
    upstream = upstream.float().contiguous()  # alive until the call returns
    compiled().divergence_gradient(
        *_arguments(student, teacher, kind, beta, norm, value, centre, upstream)
    )


def transpose(x: Tensor, out: Tensor) -> None:
    check_rows("out", out, x.shape[0])
    if out.shape[0] != x.shape[1] or out.dtype != x.dtype or x.element_size() != 2:
        raise RuntimeError(f"transpose: {out.dtype} {tuple(out.shape)} for {tuple(x.shape)}")
    compiled().transpose(products_of(Chunk(x)), out.data_ptr(), out.stride(0))


def _arguments(
    student: Chunk,
    teacher: Chunk,
    kind: str,
    beta: float,
    norm: Tensor,
    value: Tensor | None,
    centre: Tensor,
    upstream: Tensor | None = None,
) -> tuple[Any, Any, Any]:
    """The C++ records of both chunks and of the rows, whose tensors are checked."""
    check_divergence_args(student, teacher, norm, value, centre, upstream)
    rows = compiled().DivergenceRows(
        KINDS.index(kind),
        beta,
        norm.data_ptr(),
        norm.stride(1),
        address(value),
        centre.data_ptr(),
        address(upstream),
    )
    return products_of(student), products_of(teacher), rows
