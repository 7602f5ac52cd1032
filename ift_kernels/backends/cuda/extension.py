"""The epilogues in CUDA C++ for tensors on NVIDIA GPUs: float32, bfloat16 and float16.

Same functions as `reference`; the extension takes raw addresses, so every tensor passed on is
checked here for the layout that the kernels assume. Everything is queued on torch's current stream,
nothing waits for the device, and torch allocates what a kernel needs beside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.layout_checks import DTYPES, address, check_chunk
from ift_kernels.backends.loading import check_contract, extension_error

try:
    from ift_kernels import _cuda  # type: ignore[attr-defined]  # compiled, may be absent

    check_contract(_cuda)
    _import_error = ""
except ImportError as error:
    _cuda = None
    _import_error = extension_error("the CUDA extension", "_cuda", error)

DEVICE = "cuda"  # the type of the devices that are served


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != DEVICE:
        return f"device {device.type} is not {DEVICE}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is served by the reference backend"
    return _import_error or _no_device()


def _no_device() -> str:
    """Why nothing can run although the extension is there; "" if it can."""
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def describe() -> dict[str, Any]:
    reason = _import_error or _no_device()
    detail = ""
    if _cuda is not None:
        built, driver = (_version(v) for v in (_cuda.built_with(), _cuda.driver_version()))
        detail = f"built with CUDA {built}, the driver is for {driver}"
    return {"available": not reason, "reason": reason, "detail": detail}


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def compiled() -> Any:
    """The compiled module."""
    return _cuda


def wants_transpose(dtype: torch.dtype) -> bool:
    """The vendor's products take a transposed operand as it is."""
    return False


def queue_of(device: torch.device) -> Any:
    """The C++ record of a device and of torch's current stream there."""
    return _cuda.Queue(*stream_of(device))


def stream_of(device: torch.device) -> tuple[int, int]:
    """The index of a device, and the handle of torch's current stream there."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def products_of(chunk: Chunk) -> tuple[Any, Any]:
    """The C++ records of the queue and of a chunk."""
    check_chunk(chunk)
    x, bias, transform, offset = chunk
    return queue_of(x.device), _cuda.Products(
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
    )


def partials(queue: Any, x: Tensor, bytes_per_part: int) -> tuple[Tensor | None, int]:
    """Memory for what blocks that share a row exchange, to be kept alive, and its address."""
    parts = _cuda.row_parts(queue, *x.shape)
    if parts == 1:
        return None, 0
    shape = x.shape[0] * parts * bytes_per_part
    memory = torch.empty(shape, dtype=torch.uint8, device=x.device)
    return memory, memory.data_ptr()
