"""Argument checks shared by the public functions: one clear line, naming the argument."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Collection

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ift_kernels.common.head_rows import HeadRows


def debugging() -> bool:
    """Whether ``IFT_DEBUG=1`` asks for checks of values on GPUs too, which stall their queue."""
    return os.environ.get("IFT_DEBUG", "0") not in ("", "0")


def one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise a ValueError unless `value` is one of the option names in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {sorted(allowed)}, got {value!r}")


def unit_interval(name: str, value: float) -> float:
    """`value` as a float in [0, 1].

    Raises:
        TypeError: not a real number.
        ValueError: outside [0, 1], or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float in [0, 1], got {type(value).__name__}")
    if math.isnan(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a float in [0, 1], got {value}")
    return float(value)


def number(name: str, value: object) -> float:
    """`value` as a float, or a TypeError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def integer(name: str, value: object) -> int:
    """`value` as an int, or a TypeError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return int(value)


def boolean(name: str, value: object) -> bool:
    """`value` if it is True or False, or a TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def reciprocal(name: str, value: object, device: torch.device) -> Tensor:
    """One over a number of items, float64 scalar without gradient; 0 of 0 items.

    So the mean over nothing, of an accumulation step without any target, is 0 and not 0/0. The
    value of a tensor is not read: on a GPU that would stall the queue.

    Args:
        value: at least 0; a number, or a tensor that holds one.

    Raises:
        TypeError: not a number.
        ValueError: a negative number, NaN, or a tensor of more than one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)}")
        items = value.detach().reshape(()).to(device, torch.float64)
        return torch.where(items == 0, 0.0, 1.0 / items)
    count = number_of_items(name, value)
    return torch.tensor(1.0 / count if count else 0.0, dtype=torch.float64, device=device)


def number_of_items(name: str, value: object) -> float:
    """A number of at least 0, or a TypeError or ValueError."""
    if not number(name, value) >= 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return number(name, value)


def same_shape(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raise a ValueError unless both tensors have the same shape and device."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected the device of {like_name}, {like.device}, got {tensor.device}"
        )


def floating(name: str, tensor: Tensor) -> None:
    """Raise a TypeError unless `tensor` is a floating point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a floating point tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")


def per_token(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is floating point (TypeError) and (B, T) or (T,) (ValueError)."""
    floating(name, tensor)
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name}: expected shape (B, T) or (T,), got {tuple(tensor.shape)}")


def as_bool_mask(mask: Tensor, like: Tensor, like_name: str) -> Tensor:
    """`mask` (bool, or 0/1 of any dtype) as bool, checked against the shape of `like`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a bool or 0/1 tensor, got {type(mask).__name__}")
    same_shape("mask", mask, like, like_name)
    return mask if mask.dtype == torch.bool else mask != 0


def seqlens(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """`cu_seqlens` as int64, checked: documents [cu[i], cu[i+1]) cover the positions of `like`.

    Its values are read only outside `torch.compile`, whose traces cannot branch on data; the
    operations themselves check again when they run. One on a GPU is read once, unless it changes.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        came = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor, got {came}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens: expected shape (documents + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != like.device:
        raise ValueError(
            f"cu_seqlens: expected on {like.device} like the tokens, got {cu_seqlens.device}"
        )
    cu, total = cu_seqlens.long().contiguous(), like.numel()
    if torch.compiler.is_compiling():
        return cu
    if not _counts_writes(cu_seqlens) or _read.get(cu_seqlens) != (total, cu_seqlens._version):
        # One synchronisation, not three.
        ends = torch.stack([cu[0], cu[-1], cu.diff().amin()]).tolist()
        if ends[:2] != [0, total]:
            raise ValueError(
                f"cu_seqlens: expected to run from 0 to {total}, the number of positions, "
                f"got {ends[0]} to {ends[1]}"
            )
        if ends[2] < 0:
            raise ValueError("cu_seqlens: expected non-decreasing values, got a decreasing pair")
    for tensor in (cu_seqlens, cu):
        if _counts_writes(tensor):
            _read[tensor] = total, tensor._version
    return cu


# How many positions a `cu_seqlens` has been found to cover, and the version it had then.
_read = WeakTensorKeyDictionary()


def _counts_writes(tensor: Tensor) -> bool:
    """Whether torch counts all writes in place: numpy and others may share memory of a CPU."""
    return tensor.device.type != "cpu" and not tensor.is_inference()


def plain_floating(name: str, value: Tensor) -> None:
    """Raise a TypeError unless `value` is dense, not sharded, and of 16-bit floats or wider."""
    floating(name, value)
    if hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor: gather it, or see "
            "ift_kernels.vocab_parallel_logprobs for a head sharded along its vocabulary"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype.itemsize < 2:
        raise TypeError(f"{name}: expected 16-bit floats or wider, got {value.dtype}")


MIN_WORKSPACE = 1 << 20
NO_FLOAT64 = ("mps",)  # types of device
DEFAULT_WORKSPACE = {"cpu": 256 << 20, "cuda": 512 << 20}  # for products in 16 bits


def head_arguments(hidden: Tensor, weight: Tensor, bias: Tensor | None, of: str = "") -> None:
    """Check that hidden (…, D), weight (V, D) and bias (V,) fit together.

    `of` is what the names of these arguments start with.
    """
    named = [(f"{of}hidden", hidden), (f"{of}weight", weight)]
    if bias is not None:
        named.append((f"{of}bias", bias))
    for name, value in named:
        plain_floating(name, value)
        if value.device != hidden.device:
            raise ValueError(
                f"{name}: expected on {hidden.device} like {of}hidden, got {value.device}"
            )
    if isinstance(weight, HeadRows):
        if weight.requires_grad:
            raise ValueError(
                f"{of}weight: expected no gradient of HeadRows, a frozen head, got "
                "requires_grad=True"
            )
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{of}weight: HeadRows cannot be part of a compiled graph, expected a call outside "
                "of torch.compile"
            )
    if hidden.device.type in NO_FLOAT64:
        raise RuntimeError(
            f"{of}hidden: on {hidden.device}, which has no float64 for the sums over a vocabulary; "
            "expected a tensor on a CPU or a GPU that has"
        )
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(
            f"{of}hidden: expected shape (..., D) with D > 0, got {tuple(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{of}weight: expected shape (V, D) with D={hidden.shape[-1]} and V > 0, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{of}bias: expected shape (V,) with V={weight.shape[0]}, got {tuple(bias.shape)}"
        )


def adapter_arguments(
    hidden: Tensor,
    weight: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    column_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """U (N, r), B (V, r) and the scale (V,), checked against a head and the dtype of products."""
    u, b = None, None
    named = {}
    if low_rank is not None:
        if not isinstance(low_rank, (tuple, list)) or len(low_rank) != 2:
            raise TypeError(
                f"low_rank: expected a tuple (u, B) or None, got {type(low_rank).__name__}"
            )
        named = {"low_rank[0]": low_rank[0], "low_rank[1]": low_rank[1]}
    if column_scale is not None:
        named["column_scale"] = column_scale
    for name, value in named.items():
        plain_floating(name, value)
        if value.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} like hidden, got {value.device}")
        if value.dtype == torch.float64 and dtype != torch.float64:
            raise TypeError(f"{name}: expected at most {dtype}, in which products are, got float64")
    if low_rank is not None:
        u, b = low_rank
        if u.dim() < 1 or u.shape[:-1] != hidden.shape[:-1] or u.shape[-1] == 0:
            raise ValueError(
                f"low_rank[0]: expected shape (..., r) with r > 0 for hidden "
                f"{tuple(hidden.shape)}, got {tuple(u.shape)}"
            )
        if tuple(b.shape) != (weight.shape[0], u.shape[-1]):
            raise ValueError(
                f"low_rank[1]: expected shape (V, r) = {(weight.shape[0], u.shape[-1])}, "
                f"got {tuple(b.shape)}"
            )
        u = u.reshape(-1, u.shape[-1])
    if column_scale is not None and tuple(column_scale.shape) != (weight.shape[0],):
        raise ValueError(
            f"column_scale: expected shape (V,) with V={weight.shape[0]}, "
            f"got {tuple(column_scale.shape)}"
        )
    return u, b, column_scale


def compute_dtype(
    hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None = None, of: str = ""
) -> torch.dtype:
    """The dtype of the operands of products: with `logits_dtype` float32, and else autocast's
    where it is on, or the common dtype of the inputs.
    """
    if logits_dtype is not None:
        return float32_logits(logits_dtype, hidden.dtype, weight.dtype)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if weight.dtype != hidden.dtype:
        double = torch.float64 in (hidden.dtype, weight.dtype)  # left alone by autocast
        how = "" if double else ", or pass logits_dtype=torch.float32, or call under torch.autocast"
        raise TypeError(
            f"{of}weight: expected {hidden.dtype} like {of}hidden, got {weight.dtype}; cast one of "
            f"them{how}"
        )
    return hidden.dtype


def float32_logits(logits_dtype: torch.dtype, *inputs: torch.dtype) -> torch.dtype:
    """float32, or a ValueError: what is asked for is another, or there are float64 inputs."""
    if logits_dtype != torch.float32:
        raise ValueError(
            f"logits_dtype: expected None or torch.float32, a torch dtype, got {logits_dtype!r}"
        )
    if torch.float64 in inputs:
        raise ValueError("logits_dtype: expected None for float64 inputs, got torch.float32")
    return torch.float32


def token_ids(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """`value` as int64 ids of the given shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32 token ids, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected on {device} like hidden, got {value.device}")
    return value.long()


def workspace_bytes(workspace: int | None, device: torch.device, dtype: torch.dtype) -> int:
    """The budget of work memory in bytes for products in `dtype`."""
    if workspace is None:
        default = DEFAULT_WORKSPACE.get(device.type, DEFAULT_WORKSPACE["cuda"])
        # Products take twice the bytes of 16-bit ones, and those that do not fit are formed twice.
        return default * 3 // 2 if dtype.itemsize > 2 else default
    budget = integer("workspace", workspace)
    if not MIN_WORKSPACE <= budget < 2**60:
        raise ValueError(f"workspace: expected at least {MIN_WORKSPACE} bytes, got {workspace}")
    return budget
