"""How the tail of the active set is spread over the ids of a bucket.

Of a tail only the sum of its gradient is known, per row and bucket. Uniform is a bad guess: the ids
below a threshold of 2⁻¹² differ by orders of magnitude, and a head trained on real text gives its
rare ids almost nothing. The mean hidden state h̄ of the rows predicts well what a row gives an id of
its tail, at the cost of one product of the head with one vector:

    q[v] ∝ exp(z̄[v]),   z̄ = the logits of h̄

up to a factor per bucket. Any q ≥ 0 keeps the sum of every row and the bound on its error. But a
block unlike the mean may have only ids of small q in its tail; then u, the gradient of the tail
over the sum of its q, is large, and what active columns of the bucket lose by u·q comes back from
the sums over the bucket, which is exact but for rounding. So q is kept within a factor `MAX_RANGE`,
which bounds u·q of an id relative to the mean of a tail, less for thresholds above 2⁻¹⁰. The
largest q is that of `CAP_SHARE` of the threshold, which few ids of a tail come near.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ift_kernels.backends.contract import RowGradient
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import Head, slices

MAX_RANGE, CAP_SHARE = 16.0, 0.25
MAX_RANGE_TIMES_THRESHOLD = 2.0**-6


def log_range(threshold: float) -> tuple[float, float]:
    """Logarithms of the probability from which on q is 1, and of the range below it."""
    if not threshold:  # nothing is in the tail
        return 0.0, 0.0
    width = min(max(MAX_RANGE_TIMES_THRESHOLD / threshold, 1.0), MAX_RANGE)
    return math.log(CAP_SHARE * threshold), math.log(width)


class TailWeights:
    """q above, from the mean of `head`'s rows."""

    def __init__(self, head: Head, row_gradient: RowGradient, threshold: float) -> None:
        _, norm, coef = row_gradient
        log_sum_exp = norm.sum(0)
        counted = (coef != 0).any(0) & log_sum_exp.isfinite()
        share = counted.to(norm.dtype) / counted.sum().clamp(min=1)
        self.mean = share.to(head.hidden.dtype) @ head.hidden
        cap, self.range = log_range(threshold)
        self.top = torch.where(counted, share * log_sum_exp, 0.0).sum() + cap
        # The gradient of mean_logit is the same for all ids, so the tail is uniform too.
        self.uniform = (coef[3] != 0).any() | ~counted.any()

    def of(self, head: Head, columns: slice) -> Tensor:
        """q of these ids, (C,) in the dtype of sums; 1 where it is unknown."""
        accum, weights = accum_dtype(head.hidden.dtype), []
        step = 1 << 14 if head.hidden.device.type == "cpu" else columns.stop - columns.start
        for some in slices(columns.start, columns.stop, step):  # a GPU wants few launches
            weight, bias = head.weight_rows(some), head.bias_chunk(some)
            products = torch.mm(weight, self.mean.to(weight.dtype)[:, None])[:, 0]
            z = head.transform.apply(products.to(accum), bias)
            q = (z - self.top).clamp(-self.range, 0.0).exp()
            weights.append(torch.where(z.isnan() | self.uniform, 1.0, q).to(accum))
        return weights[0] if len(weights) == 1 else torch.cat(weights)
