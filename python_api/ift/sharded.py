"""Operations on a head that may be sharded: of a DTensor weight their vocab-parallel form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ift_kernels import (
    SelectedLogprobs,
    TokenStats,
    TopK,
    linear_logprobs,
    linear_selected_logprobs,
    linear_topk,
    vocab_parallel_logprobs,
    vocab_parallel_selected_logprobs,
    vocab_parallel_topk,
)
from ift_kernels.vocab_parallel import is_sharded


def logprobs(hidden: Tensor, weight: Tensor, target: Tensor, **head: Any) -> TokenStats:
    """`linear_logprobs`."""
    operation = vocab_parallel_logprobs if is_sharded(weight) else linear_logprobs
    return operation(hidden, weight, target, **head)


def selected_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, **head: Any) -> SelectedLogprobs:
    """`linear_selected_logprobs`."""
    operation = vocab_parallel_selected_logprobs if is_sharded(weight) else linear_selected_logprobs
    return operation(hidden, weight, ids, **head)


def topk(hidden: Tensor, weight: Tensor, k: int, **head: Any) -> TopK:
    """`linear_topk`."""
    operation = vocab_parallel_topk if is_sharded(weight) else linear_topk
    return operation(hidden, weight, k, **head)
