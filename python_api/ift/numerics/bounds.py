"""The numerics contract: how far each result may be from that of exact arithmetic.

One table, `UNITS`, has the rounding of each dtype, and a few constants the rest; from them and the
inputs follows a bound for every element of every result. docs/numerics.md states both, the
property tests hold every operation to them, and ``ift numerics`` reports how much is used.

A logit z = h·w is computed as z(1 + δ): |δ| ≤ u of its product, plus the fp32 sum over D. The
transform carries that error to η (`Head.error`), and each statistic moves by what η can do to it:
`lse` by at most lse(z + η) − lse(z), `logprob` by that of the gaps to the target, so that the
log-probability of a nearly certain token is nearly exact. Gradients of logits follow from errors of
probabilities, are rounded as their product reads them, and are summed with the rounding of theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ift.numerics import oracle

# What the fp64 formula itself loses of 1 − p where lse is 1: in z − lse, and in 1 − exp(log p).
ORACLE = 2.0**-50
ARITHMETIC = 4  # roundings of an epilogue in fp32: exponential, logarithm, and what joins them
SUMMED = 128  # columns that an epilogue sums in a row in fp32
ROUNDINGS = 3  # of a 16-bit gradient: terms, sums over blocks of tokens, the upstream factor


class Units(NamedTuple):
    """Unit roundoffs on the way from the inputs of a head to its results."""

    logit: float  # of a logit as its product gives it
    dlogit: float  # of a gradient of a logit, as the products of backward read it
    sum: float  # of sums and statistics
    result: float  # of gradients, in the dtype of what they are of
    underflow: float  # the largest number that a 16-bit tensor may hold as 0
    largest: float  # that a gradient may hold


FP32, FP64 = 2.0**-24, 2.0**-52  # fp64 twice: what it is compared with is rounded as well
BF16, FP16 = 2.0**-8, 2.0**-11

# By the dtype of hidden and weight and by `logits_dtype`.
UNITS: dict[tuple[torch.dtype, torch.dtype | None], Units] = {
    (torch.float64, None): Units(FP64, FP64, FP64, FP64, 2.0**-1000, 2.0**1000),
    (torch.float32, None): Units(FP32, FP32, FP32, FP32, 2.0**-126, 2.0**127),
    (torch.bfloat16, None): Units(BF16, BF16, FP32, BF16, 2.0**-126, 2.0**127),
    (torch.float16, None): Units(FP16, FP16, FP32, FP16, 2.0**-24, 2.0**15),
    (torch.float32, torch.float32): Units(FP32, FP32, FP32, FP32, 2.0**-126, 2.0**127),
    (torch.bfloat16, torch.float32): Units(FP32, FP32, FP32, BF16, 2.0**-126, 2.0**127),
    (torch.float16, torch.float32): Units(FP32, FP32, FP32, FP16, 2.0**-24, 2.0**15),
}


def units(*dtypes: torch.dtype, logits_dtype: torch.dtype | None = None) -> Units:
    """Of inputs of these dtypes: the largest roundoff of each."""
    rows = [UNITS[dtype, logits_dtype] for dtype in dtypes]
    coarsest = Units(*(max(column) for column in zip(*rows, strict=True)))
    return coarsest._replace(largest=min(row.largest for row in rows))


def promise(dtype: torch.dtype) -> str:
    """The row of a dtype in words."""
    row, wide = UNITS[dtype, None], UNITS.get((dtype, torch.float32), UNITS[dtype, None])
    text = f"logits to {power(row.logit)} of their size"
    if wide.logit < row.logit:
        text += f" ({power(wide.logit)} with logits_dtype=torch.float32)"
    return f"{text}, statistics to {power(row.sum)}, gradients to {power(row.result)}"


def power(value: float) -> str:
    """A power of two as such.

    >>> power(0.125)
    '2⁻³'
    """
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+")
    return "2" + value.hex().partition("p")[2].translate(digits)


def products_unit(terms: int, unit: float) -> float:
    """Of a sum of so many products, against the sum of their magnitudes.

    At worst every rounding has the same sign; of many, 8√n are never seen to.
    """
    return unit * (min(terms, 8 * math.sqrt(terms)) + 1)


@dataclass(frozen=True)
class Head:
    """Exact logits (N, V) in fp64 with the errors that a dtype allows them.

    Made by `head`; `slope` is the derivative of a logit with respect to its product.
    """

    z: Tensor
    error: Tensor
    slope: Tensor
    slope_error: Tensor
    units: Units

    @property
    def lse_error(self) -> Tensor:
        """(N,): lse is convex and rises with every logit."""
        return (self.z + self.error).logsumexp(-1) - self.z.logsumexp(-1)

    @property
    def sum_error(self) -> Tensor:
        """(N,) relative, of the fp32 sum of exponentials; of small ones beside a 1 all may go."""
        others = -torch.expm1(self.z.log_softmax(-1).amax(-1))
        return others.clamp(min=0, max=self.units.sum * min(self.z.shape[1], SUMMED))

    def rest_error(self, target: Tensor) -> Tensor:
        """(N,) of 1 − p of a target, by the sum over the others: its own 1 is not in there."""
        rest = self.z.scatter(-1, target[:, None], -math.inf)
        smaller = -torch.expm1(rest.log_softmax(-1).amax(-1)).nan_to_num(0)
        relative = smaller.clamp(min=0, max=self.units.sum * min(self.z.shape[1], SUMMED))
        return -torch.expm1(self.z.log_softmax(-1).gather(-1, target[:, None])[:, 0]) * relative

    def probability_error(self) -> Tensor:
        """(N, V) of softmax."""
        logp = self.z.log_softmax(-1)
        p = logp.exp()
        relative = torch.expm1(self.error + self.lse_error[:, None])
        arithmetic = self.units.sum * (ARITHMETIC + finite(logp).abs()) + self.sum_error[:, None]
        error = p * (relative + arithmetic) + (2.0**-126 if self.units.sum == FP32 else 2.0**-1000)
        return torch.where(p > 0, error.clamp(max=1.0), 0)  # small ones are 0 in fp32

    def logprob_error(self, ids: Tensor) -> Tensor:
        """(N,) of the log-probability of a token each: only its gaps to the others count."""
        own = ids[:, None]
        gap = self.z - self.z.gather(-1, own)
        error = (self.error + self.error.gather(-1, own)).scatter(-1, own, 0)
        moved = (gap + error).logsumexp(-1) - gap.logsumexp(-1)
        arithmetic = self.units.sum * ARITHMETIC * (1 + gap.logsumexp(-1).abs())
        return moved + arithmetic + self.sum_error


def head(
    hidden: Tensor,  # (N, D) fp64
    weight: Tensor,  # (V, D) fp64
    bias: Tensor | None,
    units: Units,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    rounded: Tensor | float = 0.0,
) -> Head:
    """The logits of a head and the errors that are allowed.

    `rounded`: what products lose in steps between, beside the rounding of the result.
    """
    unit = units.sum
    product = hidden @ weight.T
    magnitude = hidden.abs() @ weight.abs().T
    error = units.logit * product.abs() + products_unit(hidden.shape[1], unit) * magnitude
    error = error + (units.underflow if units.logit > unit else 0.0) + rounded
    z = product if bias is None else product + bias
    error = abs(logit_scale) * (error + unit * (product.abs() + 2 * finite(z).abs()))
    z = logit_scale * z
    slope = torch.full_like(z, logit_scale)
    slope_error = torch.zeros_like(z)
    if softcap:
        bent = torch.tanh(z / softcap)
        # The steepest point that the error can reach.
        steepest = 1 - torch.tanh((z.abs() - error).clamp(min=0) / softcap).square()
        moved = torch.where(z.isfinite(), steepest * error, 0)
        error = moved + 4 * unit * softcap * bent.abs()
        slope = slope * (1 - bent.square())
        slope_error = abs(logit_scale) * (2 * bent.abs() * error / softcap + 4 * unit)
        slope_error = slope_error + abs(logit_scale) * (error / softcap).square()
        z = softcap * bent
    z, slope, slope_error = z / temperature, slope / temperature, slope_error / temperature
    error = error / temperature + 2 * unit * finite(z).abs()
    slope_error = slope_error + 4 * unit * slope.abs()
    return Head(z, torch.where(z.isfinite(), error, 0), slope, slope_error, units)


def statistics(h: Head, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """(N,) of every differentiable statistic and of those of the best two; 0 where not valid.

    `target` (N,) has an id where a row is not valid, too. For `argmax` see `may_be_best`.
    """
    z, unit, vocabulary = h.z, h.units.sum, h.z.shape[1]
    logp = z.log_softmax(-1)
    exact = oracle.statistics(z, target)
    lse = h.lse_error + unit * ARITHMETIC * (1 + exact["lse"].abs()) + h.sum_error
    squares = (2 * (z + h.error)).logsumexp(-1) - (2 * z).logsumexp(-1) + 2 * h.lse_error
    centred = z - z.amax(-1, keepdim=True)
    spread = finite(centred).abs().mean(-1)
    arithmetic = unit * 2 * ARITHMETIC + 3 * h.sum_error
    found = {
        "logprob": h.logprob_error(target),
        "lse": lse,
        "entropy": _entropy(h, logp, exact["entropy"]),
        "argmax_logprob": _of_rank(h, 1),
        "second_logprob": _of_rank(h, 2) if vocabulary > 1 else torch.zeros_like(lse),
        "sum_sq": (exact["sum_sq"] * (torch.expm1(squares) + arithmetic)).clamp(max=1.0),
        "mean_logit": h.error.mean(-1)
        + unit * min(vocabulary, SUMMED) * spread
        + unit * ARITHMETIC * (1 + exact["lse"].abs() + finite(exact["mean_logit"]).abs()),
    }
    own = target[:, None]
    found["target_logit"] = h.error.gather(-1, own)[:, 0] + 2 * unit * exact["target_logit"].abs()
    return {name: torch.where(valid, value, 0) for name, value in found.items()}


def may_be_best(h: Head, ids: Tensor, scores: Tensor | None = None, rank: int = 1) -> Tensor:
    """(N,) bool: whether the logits may be rounded such that `ids` have that rank among them.

    `scores`: noise that is added to the logits.
    """
    z = h.z if scores is None else h.z + scores
    error = h.error if scores is None else h.error + h.units.sum * ARITHMETIC * (1 + scores.abs())
    own, own_error = z.gather(-1, ids[:, None])[:, 0], error.gather(-1, ids[:, None])[:, 0]
    least = (z - error).topk(rank).values[:, -1]
    most = (z + error).topk(rank).values[:, -1]
    return (own + own_error >= least) & (own - own_error <= most)


def _of_rank(h: Head, rank: int) -> Tensor:
    """(N,) of the log-probability of the best or second-best token."""
    best = h.z.topk(rank).indices[:, -1]
    candidates = (h.z + h.error >= (h.z - h.error).topk(rank).values[:, -1:]) & h.z.isfinite()
    loose = torch.where(candidates, h.error, 0).amax(-1) + h.lse_error
    logp = finite(h.z.log_softmax(-1).gather(-1, best[:, None])[:, 0])
    loose = loose + h.units.sum * ARITHMETIC * (1 + logp.abs()) + h.sum_error
    # With one candidate for the first place it is a token like any other.
    return torch.where(candidates.sum(-1) == 1, h.logprob_error(best), loose)


def _entropy(h: Head, logp: Tensor, exact: Tensor) -> Tensor:
    """Its derivative is −p(log p + H); what an error of a logit moves that by is added."""
    p, unit = logp.exp(), h.units.sum
    # Logits that no error makes likely do not count.
    likely = logp + 2 * h.error >= -60.0
    most = torch.where(likely, h.error, 0).amax(-1)
    sensitivity = p * ((finite(logp) + exact[:, None]).abs() + 2 * most[:, None])
    moved = torch.exp(2 * most) * (sensitivity * h.error).sum(-1)
    arithmetic = (unit * 2 * ARITHMETIC + 2 * h.sum_error) * (1 + exact)
    return moved.clamp(max=math.log(logp.shape[1])) + arithmetic


def dlogits(
    h: Head, target: Tensor, upstream: dict[str, Tensor], lse_factor_error: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(N, V) gradients of the logits for `upstream` (N,) into the statistics, and their errors.

    `lse_factor_error` (N,): of what goes into lse, where that is computed.
    """
    unit = h.units.sum
    logp, own = h.z.log_softmax(-1), target[:, None]
    p, p_error = logp.exp(), h.probability_error()
    zero = torch.zeros_like(h.z[:, 0])
    u = {name: upstream.get(name, zero)[:, None] for name in ("logprob", "lse", "entropy")}
    hot = torch.zeros_like(p).scatter_(-1, own, 1.0)
    # 1 − p of the target is the sum of the others.
    others = (p_error.sum(-1) - p_error.gather(-1, own)[:, 0]).clamp(min=0)[:, None]
    left = -torch.expm1(logp.gather(-1, own))
    own_error = torch.minimum(p_error.gather(-1, own), others) + ARITHMETIC * unit * left
    oracle_error = ORACLE * (1 + h.z.logsumexp(-1, keepdim=True).abs())
    own_error = own_error + h.rest_error(target)[:, None] + oracle_error
    to_target = torch.where(hot > 0, own_error, p_error)
    gradient = u["logprob"] * (hot - p) + u["lse"] * p
    error = u["logprob"].abs() * to_target + u["lse"].abs() * p_error
    # Coefficients of p are added up first, which may cancel.
    sizes = [value.abs() for value in upstream.values()]
    several = sum(((size > 0).to(zero) for size in sizes), zero) > 1
    joined = torch.where(several, sum(sizes, zero), 0)[:, None]
    error = error + ARITHMETIC * unit * joined * p
    if lse_factor_error is not None:
        error = error + lse_factor_error[:, None] * p
    if "entropy" in upstream:
        exact = -(p * finite(logp)).sum(-1)
        deviation = finite(logp) + exact[:, None]
        gradient = gradient - u["entropy"] * p * deviation
        moved = h.error + h.lse_error[:, None] + _entropy(h, logp, exact)[:, None]
        moved = moved + ARITHMETIC * unit * (1 + finite(logp).abs() + exact[:, None])
        error = error + u["entropy"].abs() * (p_error * deviation.abs() + (p + p_error) * moved)
    if "target_logit" in upstream:
        gradient = gradient + upstream["target_logit"][:, None] * hot
    if "mean_logit" in upstream:
        share = upstream["mean_logit"][:, None] / p.shape[1]
        gradient = gradient + share
        error = error + 2 * unit * share.abs()
    return gradient, error + ARITHMETIC * unit * gradient.abs()


class Gradients(NamedTuple):
    """Errors of the gradients of a head's tensors."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)


def gradients(
    h: Head,
    hidden: Tensor,
    weight: Tensor,
    gradient: Tensor,
    error: Tensor,
    terms: Tensor | None = None,
) -> Gradients:
    """What errors of the gradients of logits (N, V) and the products of backward allow.

    `terms`: magnitudes of the terms of `gradient`, where each has a slope of its own.
    """
    units, product = h.units, gradient * h.slope
    terms = gradient.abs() if terms is None else terms
    error = error * (h.slope.abs() + h.slope_error) + terms * h.slope_error
    error = error + units.dlogit * product.abs() + torch.where(gradient != 0, units.underflow, 0)
    size = product.abs()
    return Gradients(
        product_errors(error, size, weight, units),
        product_errors(error.T, size.T, hidden, units),
        product_errors(error.T, size.T, torch.ones_like(hidden[:, :1]), units)[:, 0],
    )


def product_errors(error: Tensor, size: Tensor, other: Tensor, units: Units) -> Tensor:
    """Of a product of a matrix with this error and these magnitudes with another, rounded.

    Infinite where the terms may be larger than what the dtype of the result holds.
    """
    rounded = products_unit(size.shape[1], units.sum) + ROUNDINGS * units.result
    total = size @ other.abs()
    found = error @ other.abs() + rounded * total + (units.underflow if size.shape[1] else 0.0)
    overflows = bool((size > units.largest / 2).any())
    return found.masked_fill((total > units.largest / 2) | overflows, math.inf)


def finite(x: Tensor) -> Tensor:
    """0 for what is not."""
    return torch.where(x.isfinite(), x, 0)
