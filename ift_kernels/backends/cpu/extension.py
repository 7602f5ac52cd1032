"""The epilogues in C++ for CPU tensors: float32, bfloat16 and float16.

Same functions as `reference`; the extension takes raw addresses, so every tensor passed on is
checked here for the layout that the C++ code assumes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.cpu import memory
from ift_kernels.backends.layout_checks import DTYPES, address, check_chunk
from ift_kernels.backends.loading import check_contract, extension_error

try:
    from ift_kernels import _cpu  # type: ignore[attr-defined]  # compiled, may be absent

    check_contract(_cpu)
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


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"device {device.type} is not cpu"
    if dtype not in DTYPES:
        return f"dtype {dtype} is served by the reference backend"
    return _import_error


def describe() -> dict[str, Any]:
    detail = "" if _cpu is None else f"{_cpu.isa()}, {torch.get_num_threads()} threads"
    return {"available": _cpu is not None, "reason": _import_error, "detail": detail}


def compiled() -> Any:
    """The compiled module."""
    return _cpu


def wants_transpose(dtype: torch.dtype) -> bool:
    """dx^T @ h is two to three times slower on 16-bit matrices than a product of plain ones."""
    return dtype.itemsize == 2


def scratch(like: Tensor, elements: int) -> Tensor:
    """Work memory in the dtype of `like`; a later call may have it as soon as this one is done."""
    buffer, new = memory.empty(like, elements)
    # Only where the pages stay: those given back come from the host of a virtual machine each time,
    # and a huge one then takes ten times longer than the small ones in its place.
    if new and buffer.untyped_storage().nbytes() >= 1 << 22:
        _cpu.advise_huge_pages(buffer.data_ptr(), buffer.untyped_storage().nbytes())
    return buffer


def products_of(chunk: Chunk) -> Any:
    """The C++ record of a chunk."""
    check_chunk(chunk)
    x, bias, transform, offset = chunk
    return _cpu.Chunk(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        x.stride(0),
        address(bias),
        transform.scale,
        transform.softcap,
        transform.temperature,
        offset,
        torch.get_num_threads(),
    )
