"""The epilogues in plain torch: the executable specification that other backends are held to.

What each function has to do is documented here and in `contract`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends.reference.active import active_mask, bucket_sums, split_active
from ift_kernels.backends.reference.divergence import (
    divergence_gradient_,
    divergence_terms,
    transpose,
)
from ift_kernels.backends.reference.dlogits import dlogits_, probabilities_, softmax_gradient_
from ift_kernels.backends.reference.sampling import gumbel_update, top_k_update
from ift_kernels.backends.reference.scaling import scale_
from ift_kernels.backends.reference.scans import scan
from ift_kernels.backends.reference.selected import put_selected, take_selected
from ift_kernels.backends.reference.statistics import stats_update
from ift_kernels.backends.reference.temporal import residual, residual_grad

__all__ = [
    "active_mask",
    "bucket_sums",
    "describe",
    "divergence_gradient_",
    "divergence_terms",
    "dlogits_",
    "gumbel_update",
    "probabilities_",
    "put_selected",
    "residual",
    "residual_grad",
    "scale_",
    "scan",
    "scratch",
    "softmax_gradient_",
    "split_active",
    "stats_update",
    "take_selected",
    "top_k_update",
    "transpose",
    "unsupported_reason",
    "wants_transpose",
]


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str:
    return "" if dtype.is_floating_point else f"dtype {dtype} is not floating point"


def describe() -> dict[str, Any]:
    return {"available": True, "reason": "", "detail": "plain torch, any device, fp64 too"}


def wants_transpose(dtype: torch.dtype) -> bool:
    """Whether the schedule should ask `dlogits_` for the transposed gradient as well."""
    return False


def scratch(like: Tensor, elements: int) -> Tensor:
    """Uninitialised work memory in the dtype and on the device of `like`."""
    return like.new_empty(elements)
