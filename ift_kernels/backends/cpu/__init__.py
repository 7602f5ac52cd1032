"""The epilogues in C++ for CPU tensors: float32, bfloat16 and float16. See `reference`."""

from ift_kernels.backends.cpu.active import bucket_sums, mark_active, take_active
from ift_kernels.backends.cpu.divergence import (
    divergence_gradient_,
    divergence_terms,
    transpose,
)
from ift_kernels.backends.cpu.dlogits import dlogits_, probabilities_
from ift_kernels.backends.cpu.extension import (
    describe,
    scratch,
    unsupported_reason,
    wants_transpose,
)
from ift_kernels.backends.cpu.sampling import gumbel_update, top_k_update
from ift_kernels.backends.cpu.scans import scan
from ift_kernels.backends.cpu.selected import put_selected, take_selected
from ift_kernels.backends.cpu.statistics import exponentials_, stats_update
from ift_kernels.backends.cpu.temporal import residual, residual_grad
from ift_kernels.backends.reference import softmax_gradient_
from ift_kernels.backends.reference.scaling import scale_

__all__ = [
    "bucket_sums",
    "describe",
    "divergence_gradient_",
    "divergence_terms",
    "dlogits_",
    "exponentials_",
    "gumbel_update",
    "mark_active",
    "probabilities_",
    "put_selected",
    "residual",
    "residual_grad",
    "scale_",
    "scan",
    "scratch",
    "softmax_gradient_",
    "stats_update",
    "take_active",
    "take_selected",
    "top_k_update",
    "transpose",
    "unsupported_reason",
    "wants_transpose",
]
