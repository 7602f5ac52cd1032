"""Token log-probabilities, cross-entropy and IFT without a (tokens, vocabulary) matrix.

Every alignment loss is a small function of per-token log-probabilities. This package computes those
from hidden states and the head weight, with gradients, inside a fixed amount of work memory.
"""

import torch  # noqa: F401  first: the extensions share torch's OpenMP runtime

from ift_kernels.backends import use_backend
from ift_kernels.class_targets import CrossEntropyStats
from ift_kernels.common.active_set import ActiveSet, ActiveSetStats, record_active_sets
from ift_kernels.common.head_rows import HeadRows
from ift_kernels.influence import exact_influence, influence
from ift_kernels.linear import TokenStats, linear_logprobs
from ift_kernels.linear_cross_entropy import linear_cross_entropy
from ift_kernels.linear_divergence import linear_divergence
from ift_kernels.linear_expected_embedding import linear_expected_embedding
from ift_kernels.linear_selected import SelectedLogprobs, linear_selected_logprobs
from ift_kernels.linear_soft_cross_entropy import linear_soft_cross_entropy
from ift_kernels.linear_token import TokenChoice, linear_token
from ift_kernels.linear_topk import TopK, linear_topk
from ift_kernels.propagation import discounted_cumsum, propagation_weights
from ift_kernels.schedule.plan import Plan, explain
from ift_kernels.temporal_residual import mixed_in_ids, temporal_residual
from ift_kernels.vocab_parallel import vocab_parallel_logprobs
from ift_kernels.vocab_parallel_selected import (
    vocab_parallel_selected_logprobs,
    vocab_parallel_topk,
)

__version__ = "0.1.0"

__all__ = [
    "ActiveSet",
    "ActiveSetStats",
    "CrossEntropyStats",
    "HeadRows",
    "Plan",
    "SelectedLogprobs",
    "TokenChoice",
    "TokenStats",
    "TopK",
    "discounted_cumsum",
    "exact_influence",
    "explain",
    "influence",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_expected_embedding",
    "linear_logprobs",
    "linear_selected_logprobs",
    "linear_soft_cross_entropy",
    "linear_token",
    "linear_topk",
    "mixed_in_ids",
    "propagation_weights",
    "record_active_sets",
    "temporal_residual",
    "use_backend",
    "vocab_parallel_logprobs",
    "vocab_parallel_selected_logprobs",
    "vocab_parallel_topk",
]
