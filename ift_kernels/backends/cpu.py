"""The epilogues in C++ for CPU tensors: float32, bfloat16 and float16.

Same functions as `reference`; the extension takes raw addresses, so every tensor passed on is
checked here for the layout that the C++ code assumes.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends import cpu_memory, reference
from ift_kernels.transform import LogitTransform


def extension_error(what: str, module: str, error: ImportError, remedy: str = "") -> str:
    """Why a compiled module of this package is not there."""
    if importlib.util.find_spec(f"ift_kernels.{module}") is not None:
        return f"{what} does not load ({error})"
    here = Path(__file__).resolve().parents[1]
    if there := _installed_elsewhere(module, here):
        return (
            f"{what} is not in {here}, which hides the installed package in {there}: start Python "
            "in another folder (python -m puts the current one first on sys.path)"
        )
    return f"{what} was not built{remedy}"


def _installed_elsewhere(module: str, here: Path) -> Path | None:
    """Another folder of this package on the path, which has the compiled module."""
    for entry in sys.path:
        folder = Path(entry, "ift_kernels").resolve()
        files = (folder / f"{module}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
        if folder != here and any(file.exists() for file in files):
            return folder
    return None


try:
    from ift_kernels import _cpu  # type: ignore[attr-defined]  # compiled, may be absent

    _import_error = ""
except ImportError as error:
    _cpu = None
    _import_error = extension_error(
        "the C++ extension", "_cpu", error,
        ": install a C++17 compiler and Python's headers, then reinstall ift-kernels",
    )  # fmt: skip
    warnings.warn(
        "ift_kernels: CPU tensors are served by the reference backend, which is slow, because "
        f"{_import_error}",
        RuntimeWarning,
        stacklevel=2,
    )

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

new_state = reference.new_state


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"device {device.type} is not cpu"
    if dtype not in DTYPES:
        return f"dtype {dtype} is served by the reference backend"
    return _import_error


def describe() -> dict[str, Any]:
    detail = "" if _cpu is None else f"{_cpu.isa()}, {torch.get_num_threads()} threads"
    return {"available": _cpu is not None, "reason": _import_error, "detail": detail}


def extension() -> Any:
    """The compiled module."""
    return _cpu


def wants_transpose(dtype: torch.dtype) -> bool:
    """dx^T @ h is two to three times slower on 16-bit matrices than a product of plain ones."""
    return dtype.itemsize == 2


def scratch(like: Tensor, elements: int) -> Tensor:
    """Work memory in the dtype of `like`; a later call may have it as soon as this one is done."""
    memory, new = cpu_memory.empty(like, elements)
    # Only where the pages stay: those given back come from the host of a virtual machine each time,
    # and a huge one then takes ten times longer than the small ones in its place.
    if new and memory.untyped_storage().nbytes() >= 1 << 22:
        _cpu.advise_huge_pages(memory.data_ptr(), memory.untyped_storage().nbytes())
    return memory


def rows(matrix: Tensor, columns: int | None = None) -> None:
    """What raw addresses rely on: rows of consecutive elements, as many as expected."""
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise RuntimeError(f"expected rows of consecutive elements, got strides {matrix.stride()}")
    if columns is not None and matrix.shape[1] != columns:
        raise RuntimeError(f"expected rows of {columns} elements, got {matrix.shape[1]}")


def vectors(length: int, *vectors: Tensor | None) -> None:
    for vector in vectors:
        if vector is not None and not (vector.shape == (length,) and vector.is_contiguous()):
            raise RuntimeError(f"expected ({length},) contiguous, got {tuple(vector.shape)}")


def chunk(x: Tensor, bias: Tensor | None, transform: LogitTransform, offset: int) -> Any:
    """The C++ record of a chunk."""
    rows(x)
    vectors(x.shape[1], bias)
    return _cpu.Chunk(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        x.stride(0),
        0 if bias is None else bias.data_ptr(),
        transform.scale,
        transform.softcap,
        transform.temperature,
        offset,
        torch.get_num_threads(),
    )


def stats_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    state: Tensor,
    argmax: Tensor,
    track: int,
) -> None:
    rows(state, x.shape[0])
    vectors(x.shape[0], target, argmax)
    piece = chunk(x, bias, transform, offset)
    _cpu.stats(
        piece, target.data_ptr(), state.data_ptr(), state.stride(0), argmax.data_ptr(), track
    )


def dlogits_(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    norm: Tensor,
    coef: Tensor,
    transposed: Tensor | None = None,
) -> None:
    rows(norm, x.shape[0])
    rows(coef, x.shape[0])
    vectors(x.shape[0], target)
    if transposed is not None:
        rows(transposed, x.shape[0])
        if transposed.shape[0] != x.shape[1] or transposed.dtype != x.dtype:
            raise RuntimeError(f"transposed: {tuple(transposed.shape)} for {tuple(x.shape)}")
    piece = chunk(x, bias, transform, offset)
    _cpu.dlogits(
        piece,
        target.data_ptr(),
        norm.data_ptr(),
        norm.stride(0),
        coef.data_ptr(),
        coef.stride(0),
        0 if transposed is None else transposed.data_ptr(),
        0 if transposed is None else transposed.stride(0),
    )


def probabilities_(x: Tensor, bias: Tensor | None, transform: LogitTransform, norm: Tensor) -> None:
    rows(norm, x.shape[0])
    _cpu.probabilities(chunk(x, bias, transform, 0), norm.data_ptr(), norm.stride(0))


def top_k_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    offset: int,
    values: Tensor,
    ids: Tensor,
) -> None:
    if not (values.shape == ids.shape and values.is_contiguous() and ids.is_contiguous()):
        raise RuntimeError("values and ids: expected contiguous (N, k)")
    if values.shape[0] != x.shape[0]:
        raise RuntimeError(f"values: {tuple(values.shape)} for {x.shape[0]} rows")
    piece = chunk(x, bias, transform, offset)
    _cpu.top_k(piece, values.data_ptr(), ids.data_ptr(), values.shape[1])


def gumbel_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    offset: int,
    seed: int,
    rows: Tensor,
    best: Tensor,
    logit: Tensor,
    ids: Tensor,
) -> None:
    vectors(x.shape[0], rows, best, logit, ids)
    _cpu.gumbel(
        chunk(x, bias, transform, offset),
        seed % 2**64,
        rows.data_ptr(),
        best.data_ptr(),
        logit.data_ptr(),
        ids.data_ptr(),
    )


# Scans and the temporal residual: whole operations, see csrc/cpu/scan.cpp and residual.cpp.


def scan(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float, left: bool
) -> Tensor:
    x, (mask, cu_seqlens) = x.contiguous(), _contiguous(mask, cu_seqlens)
    out = torch.empty_like(x)
    rows, length = x.shape
    _cpu.scan(
        x.data_ptr(),
        _address(mask),
        _address(cu_seqlens),
        out.data_ptr(),
        rows if cu_seqlens is None else cu_seqlens.numel() - 1,
        length,
        gamma,
        left,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def residual(
    embedding: Tensor,
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lam: float,
    ignore_index: int,
) -> Tensor:
    embedding, width = embedding.contiguous(), embedding.shape[1]
    out = embedding.new_empty(*ids.shape, width)
    tokens = _contiguous(ids, predicted, labels, cu_seqlens)  # alive until the call returns
    _cpu.residual(
        embedding.data_ptr(),
        _residual_tokens(tokens, ids.shape, ignore_index),
        out.data_ptr(),
        width,
        lam,
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )
    return out


def residual_grad(
    grad: Tensor,
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lam: float,
    ignore_index: int,
    vocabulary: int,
) -> Tensor:
    grad, width = grad.contiguous(), grad.shape[2]
    out = grad.new_empty(vocabulary, width)
    tokens = _contiguous(ids, predicted, labels, cu_seqlens)  # alive until the call returns
    _cpu.residual_grad(
        grad.data_ptr(),
        _residual_tokens(tokens, ids.shape, ignore_index),
        out.data_ptr(),
        vocabulary,
        width,
        lam,
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _residual_tokens(
    tokens: tuple[Tensor | None, ...], shape: torch.Size, ignore_index: int
) -> Any:
    """The C++ record of ids, predicted, labels, all of `shape` (R, T), and cu_seqlens."""
    documents = 0 if tokens[3] is None else tokens[3].numel() - 1
    addresses = (_address(tensor) for tensor in tokens)
    return _cpu.ResidualTokens(*addresses, documents, shape.numel(), shape[1], ignore_index)


from ift_kernels.backends.cpu_active import *  # noqa: E402,F403  the active set
from ift_kernels.backends.cpu_divergence import *  # noqa: E402,F403  divergence of two heads
