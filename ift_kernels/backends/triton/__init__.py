"""The epilogues as Triton kernels for GPUs: float32, bfloat16 and float16.

Same functions as `reference`. Triton itself is imported when a first tensor is served: it is not
installed everywhere, and importing it takes a while. Under ``TRITON_INTERPRET=1``, set before that,
the kernels run in Triton's interpreter on CPU tensors, which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from ift_kernels.backends import reference

OLDEST = (3, 4)
# With committed limits of what they compile; see `bench.gpu.static`.
CHECKED = ("3.6", "3.7")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

wants_transpose = reference.wants_transpose  # cuBLAS reads either operand transposed
scratch = reference.scratch
transpose = reference.transpose  # never called, since none is wanted

# Where the functions of the contract are; see `contract` for what they do.
_MODULES = {
    "statistics": ("stats_update",),
    "dlogits": ("dlogits_", "probabilities_", "softmax_gradient_"),
    "sampling": ("top_k_update", "gumbel_update", "partly_plain_torch"),
    "selected": ("take_selected", "put_selected"),
    "active": ("active_mask", "split_active", "bucket_sums"),
    "divergence": ("divergence_terms", "divergence_gradient_"),
    "scaling": ("scale_",),
    "scans": ("scan",),
    "temporal": ("residual", "residual_grad"),
    # Beyond the contract: what a schedule may use where a backend has it.
    "fused": ("fused_statistics",),
    "gathered": ("add_active_products",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: decided when they are first imported."""
    from ift_kernels.backends.triton import launch

    return launch.INTERPRETED


@functools.cache
def _unavailable() -> str:
    """Why Triton cannot be used in this process, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton
    except Exception as error:  # a broken installation must not take the other backends along
        return f"triton does not load ({error})"
    if _version(triton) < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    return ""


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def interpreter_unavailable() -> str:
    """Why Triton's interpreter cannot run beside this numpy, or "" if it can."""
    import numpy
    import triton

    # They turn arrays of one element into numbers.
    if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        versions = triton.__version__, numpy.__version__
        return "the interpreter of triton {} needs numpy below 2.4, got {}".format(*versions)
    return ""


@functools.cache
def _device_too_old(index: int) -> str:
    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str:
    if device.type not in ("cuda", "cpu"):
        return f"device {device.type} is not cuda"
    if device.type == "cpu" and not _interpreter_wanted():
        return "device cpu is not cuda, and TRITON_INTERPRET=1 is not set"
    if dtype not in DTYPES:
        return f"dtype {dtype} is served by the reference backend"
    if reason := _unavailable():
        return reason
    if device.type == "cpu":
        late = "TRITON_INTERPRET=1 was set after the kernels had been loaded"
        return interpreter_unavailable() if interpreted() else late
    if interpreted():
        return interpreter_unavailable()  # copied to the CPU and back: slow, but right
    index = torch.cuda.current_device() if device.index is None else device.index
    return _device_too_old(index)


def describe() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    reason = unsupported_reason(device, torch.float32)
    if not cuda and not _interpreter_wanted():
        reason = _unavailable() or "torch sees no GPU"
    details = []
    if not _unavailable():
        import triton

        if not reason:
            where = torch.cuda.get_device_name(device) if cuda else "interpreter"
            details.append(f"triton {triton.__version__}, {where}")
        if ".".join(map(str, _version(triton))) not in CHECKED:
            known = f"compiled kernels are checked with {' and '.join(CHECKED)}"
            details.append(f"triton {triton.__version__} is untested: {known}")
    return {"available": not reason, "reason": reason, "detail": "; ".join(details)}
