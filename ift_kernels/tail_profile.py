"""How the tail of the active set is spread over the ids of a tail tile.

Of a tail backward knows, per row and tail tile, the sum of its gradient alone. Uniform is a bad
guess: the ids below a threshold of 2⁻¹² differ by orders of magnitude, and a head trained on real
text gives its rare ids almost nothing. What a row gives an id of its tail is well told by what the
mean hidden state h̄ of the rows gives it, which takes one product of the head with one vector:

    q[v] ∝ exp(z̄[v]),   z̄ = the logits of h̄

up to a factor per tail tile. Any q ≥ 0 keeps the sum of every row and the bound on its error. But a
block unlike the mean may have only ids of small q in its tail; then u, the gradient of the tail
over the sum of its q, is large, and what active columns of the tile lose by u·q they gain back from
the sums over the tile, which is exact but for rounding. So q is kept within a `RANGE`, which is
what u·q of an id can be of the mean of a tail, at most, and that below `MOST` for thresholds that
are large. Where in between the probabilities of a tail matter most: up to a `CAP` below the
threshold, which few of its ids come near.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ift_kernels.engine import Head, RowGradient, slices
from ift_kernels.sums import wide_dtype

RANGE, CAP, MOST = 16.0, 0.25, 2.0**-6


def window(threshold: float) -> tuple[float, float]:
    """Logarithms of the largest probability that q tells from others, and of the range below it."""
    if not threshold:  # nothing is in the tail
        return 0.0, 0.0
    return math.log(CAP * threshold), math.log(min(max(MOST / threshold, 1.0), RANGE))


class TailProfile:
    """What the mean of `head`'s rows gives every id, see above."""

    def __init__(self, head: Head, row_gradient: RowGradient, threshold: float) -> None:
        _, norm, coef = row_gradient
        log_sum_exp = norm.sum(0)
        counts = (coef != 0).any(0) & log_sum_exp.isfinite()
        share = counts.to(norm.dtype) / counts.sum().clamp(min=1)
        self.mean = share.to(head.hidden.dtype) @ head.hidden
        cap, self.range = window(threshold)
        self.top = torch.where(counts, share * log_sum_exp, 0.0).sum() + cap
        # The gradient of mean_logit is the same for all ids, so the tail is uniform too.
        self.uniform = (coef[3] != 0).any() | ~counts.any()

    def of(self, head: Head, columns: slice) -> Tensor:
        """q of these ids, (C,) in the dtype of sums; 1 where it cannot be told."""
        wide, profile = wide_dtype(head.hidden.dtype), []
        for some in slices(columns.start, columns.stop, 1 << 14):
            weight, bias = head.weight[some], head.bias_chunk(some)
            products = torch.mm(weight, self.mean.to(weight.dtype)[:, None])[:, 0]
            z = head.transform.apply(products.to(wide), bias)
            q = (z - self.top).clamp(-self.range, 0.0).exp()
            profile.append(torch.where(z.isnan() | self.uniform, 1.0, q).to(wide))
        return torch.cat(profile)
