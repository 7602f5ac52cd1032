"""The epilogues in CUDA C++ for tensors on NVIDIA GPUs: float32, bfloat16 and float16.

Same functions as `reference`; the extension takes raw addresses, so every tensor passed on is
checked here for the layout that the kernels assume. Everything is queued on torch's current stream,
nothing waits for the device, and torch allocates what a kernel needs beside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends import reference
from ift_kernels.backends.cpu import DTYPES, extension_error, rows, vectors
from ift_kernels.transform import LogitTransform

try:
    from ift_kernels import _cuda  # type: ignore[attr-defined]  # compiled, may be absent

    _import_error = ""
except ImportError as error:
    _cuda = None
    _import_error = extension_error("the CUDA extension", "_cuda", error)

DEVICE = "cuda"  # the type of the devices that are served

new_state = reference.new_state
scratch = reference.scratch


def why_not(device: torch.device, dtype: torch.dtype) -> str:
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


def extension() -> Any:
    """The compiled module."""
    return _cuda


def wants_transpose(dtype: torch.dtype) -> bool:
    """The vendor's products take a transposed operand as it stands."""
    return False


def _queue(device: torch.device) -> Any:
    """Torch's current stream of a device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda.Queue(index, torch._C._cuda_getCurrentRawStream(index))


def _products(
    x: Tensor, bias: Tensor | None, transform: LogitTransform, offset: int
) -> tuple[Any, Any]:
    """The C++ records of the queue and of a chunk."""
    rows(x)
    vectors(x.shape[1], bias)
    return _queue(x.device), _cuda.Products(
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
    )


def _shared_rows(queue: Any, x: Tensor, bytes_per_part: int) -> tuple[Tensor | None, int]:
    """Room for what blocks that share a row hand over, to be kept alive, and its address."""
    parts = _cuda.row_parts(queue, *x.shape)
    if parts == 1:
        return None, 0
    shape = x.shape[0] * parts * bytes_per_part
    room = torch.empty(shape, dtype=torch.uint8, device=x.device)
    return room, room.data_ptr()


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
    queue, products = _products(x, bias, transform, offset)
    more = bool(track & ~(reference.TRACK_ARGMAX | reference.TRACK_ENTROPY))
    _room, between = _shared_rows(queue, x, _cuda.STATS_BYTES)
    _cuda.stats(
        queue,
        products,
        target.data_ptr(),
        state.data_ptr(),
        state.stride(0),
        argmax.data_ptr(),
        more,
        between,
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
    queue, products = _products(x, bias, transform, offset)
    _cuda.dlogits(
        queue,
        products,
        target.data_ptr(),
        norm.data_ptr(),
        norm.stride(0),
        coef.data_ptr(),
        coef.stride(0),
    )
    if transposed is not None:
        transposed.copy_(x.T)


def probabilities_(x: Tensor, bias: Tensor | None, transform: LogitTransform, norm: Tensor) -> None:
    rows(norm, x.shape[0])
    queue, products = _products(x, bias, transform, 0)
    _cuda.probabilities(queue, products, norm.data_ptr(), norm.stride(0))


def top_k_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    offset: int,
    values: Tensor,
    ids: Tensor,
) -> None:
    if values.shape[1] > _cuda.MOST_TOP_K:  # the kernel reads a row k times
        reference.top_k_update(x, bias, transform, offset, values, ids)
        return
    if not (values.shape == ids.shape and values.is_contiguous() and ids.is_contiguous()):
        raise RuntimeError("values and ids: expected contiguous (N, k)")
    if values.shape[0] != x.shape[0]:
        raise RuntimeError(f"values: {tuple(values.shape)} for {x.shape[0]} rows")
    queue, products = _products(x, bias, transform, offset)
    _cuda.top_k(queue, products, values.data_ptr(), ids.data_ptr(), values.shape[1])


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
    queue, products = _products(x, bias, transform, offset)
    _room, between = _shared_rows(queue, x, 8)
    _cuda.gumbel(
        queue,
        products,
        seed % 2**64,
        rows.data_ptr(),
        best.data_ptr(),
        logit.data_ptr(),
        ids.data_ptr(),
        between,
    )


from ift_kernels.backends.cuda_active import *  # noqa: E402,F403  the active set
from ift_kernels.backends.cuda_rows import *  # noqa: E402,F403  scans, residual
from ift_kernels.backends.reference_divergence import *  # noqa: E402,F403  in plain torch
