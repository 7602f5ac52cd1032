"""The epilogues in CUDA C++ for NVIDIA GPUs: float32, bfloat16 and float16. See `reference`."""

from ift_kernels.backends.cuda.active import active_mask, bucket_sums, split_active
from ift_kernels.backends.cuda.dlogits import dlogits_, probabilities_
from ift_kernels.backends.cuda.extension import (
    describe,
    unsupported_reason,
    wants_transpose,
)
from ift_kernels.backends.cuda.sampling import gumbel_update, partly_plain_torch, top_k_update
from ift_kernels.backends.cuda.scans import scan
from ift_kernels.backends.cuda.selected import put_selected, take_selected
from ift_kernels.backends.cuda.statistics import stats_update
from ift_kernels.backends.cuda.temporal import residual, residual_grad
from ift_kernels.backends.reference import scratch, softmax_gradient_
from ift_kernels.backends.reference.divergence import (
    divergence_gradient_,
    divergence_terms,
    transpose,
)
from ift_kernels.backends.reference.scaling import scale_

__all__ = [
    "active_mask",
    "bucket_sums",
    "describe",
    "divergence_gradient_",
    "divergence_terms",
    "dlogits_",
    "gumbel_update",
    "partly_plain_torch",
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
