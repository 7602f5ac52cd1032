"""Bounds of cross-entropies against classes and probabilities, weighted and smoothed.

All are Σ q·(lse − z) + z_loss·lse² with q of some classes, of ids, of the whole vocabulary, or of
two of these. A class of weight w in a uniform distribution has q = w/V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ift.numerics import bounds, bounds_selected, oracle
from ift.numerics.bounds import ARITHMETIC, SUMMED, Head, finite


class Dlogits(NamedTuple):
    """Of the gradients of logits (N, V), for `bounds.gradients`."""

    size: Tensor  # magnitudes of what products read
    error: Tensor
    terms: Tensor  # magnitudes of terms that have slopes of their own


def classes(
    h: Head,
    target: Tensor,  # (N,)
    valid: Tensor,  # (N,)
    products: Tensor | None,
    *,
    label_smoothing: float,
    z_loss: float,
    class_weight: Tensor | None,  # (V,)
) -> Tensor:
    """(N,) of `linear_cross_entropy`.

    `products` (N, V): Σ |h·w| of every logit, in its units, where no softcap follows.
    """
    allowed = bounds.statistics(h, target, valid)
    found = (1 - label_smoothing) * allowed["logprob"]
    if class_weight is not None:
        found = found * class_weight[target]
        uniform = _uniform(h, class_weight, products)
        found = found + label_smoothing * torch.where(valid, uniform, 0)
    elif label_smoothing:
        found = found + label_smoothing * (allowed["mean_logit"] + allowed["lse"])
    lse = torch.where(valid, h.z.logsumexp(-1), 0)
    return found + squared(lse, allowed["lse"], z_loss)


def classes_dlogits(
    h: Head,
    target: Tensor,
    upstream: Tensor,  # (N,) into the losses
    *,
    label_smoothing: float,
    z_loss: float,
    class_weight: Tensor | None,
) -> Dlogits:
    """Of `classes`."""
    g, lse = upstream, h.z.logsumexp(-1)
    error = 2 * z_loss * g.abs() * _lse_error(h)
    into = {"logprob": -(1 - label_smoothing) * g, "lse": 2 * z_loss * lse * g}
    if class_weight is None:
        if label_smoothing:
            into["lse"] = into["lse"] + label_smoothing * g
            into["mean_logit"] = -label_smoothing * g
        return _alone(*bounds.dlogits(h, target, into, error))
    into["logprob"] = into["logprob"] * class_weight[target]
    found = bounds.dlogits(h, target, into, error)
    if not label_smoothing:
        return _alone(*found)
    sizes = into["logprob"].abs() + into["lse"].abs()
    return _with_uniform(h, *found, sizes, class_weight, label_smoothing * g)


def probabilities(h: Head, q: Tensor, z_loss: float) -> Tensor:
    """(N,) of `linear_soft_cross_entropy` of weighted and smoothed probabilities (N, V).

    Logits are taken relative to the largest, so that only their gaps to lse count.
    """
    unit, logp = h.units.sum, h.z.log_softmax(-1)
    gap = -logp.amax(-1)
    lse = h.lse_error + h.sum_error + unit * ARITHMETIC * (1 + gap)
    size = (q * finite(logp).abs()).sum(-1)
    found = (q * h.error).sum(-1) + q.sum(-1) * lse + unit * (SUMMED + 2 * ARITHMETIC) * size
    return found + squared(h.z.logsumexp(-1), _lse_error(h), z_loss)


def probabilities_dlogits(h: Head, q: Tensor, upstream: Tensor, z_loss: float) -> Dlogits:
    """Of `probabilities`: (Σq + 2·z_loss·lse)·p − q, subtracted before it is rounded."""
    unit, p, lse = h.units.sum, h.z.softmax(-1), h.z.logsumexp(-1)
    g, total = upstream.abs(), q.sum(-1)
    coef = total + 2 * z_loss * lse
    coef_error = unit * (SUMMED + ARITHMETIC) * total
    coef_error = coef_error + 2 * z_loss * (_lse_error(h) + ARITHMETIC * unit * lse.abs())
    terms = g[:, None] * (coef.abs()[:, None] * p + q)
    error = (g * coef.abs())[:, None] * h.probability_error() + (g * coef_error)[:, None] * p
    size = (g[:, None] * (coef[:, None] * p - q)).abs()
    return Dlogits(size, error + ARITHMETIC * unit * terms, terms)


def ids(
    h: Head,
    at: Tensor,  # (N, K)
    probs: Tensor,  # (N, K) weighted, 0 of padding
    uniform: Tensor,  # (V,) weights of classes
    products: Tensor | None,  # as for `classes`
    *,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """(N,) of `linear_soft_cross_entropy` of some ids."""
    allowed, logp = bounds_selected.selected(h, at), oracle.selected(h.z, at)["logprob"]
    found = (probs * allowed["logprob"]).sum(-1)
    arithmetic = h.units.sum * (min(at.shape[1], SUMMED) + ARITHMETIC)
    found = (1 - label_smoothing) * (found + arithmetic * (probs * logp.abs()).sum(-1))
    if label_smoothing:
        found = found + label_smoothing * _uniform(h, uniform, products)
    return found + squared(h.z.logsumexp(-1), allowed["lse"], z_loss)


def ids_dlogits(
    h: Head,
    at: Tensor,
    probs: Tensor,
    uniform: Tensor,
    upstream: Tensor,
    *,
    label_smoothing: float,
    z_loss: float,
) -> Dlogits:
    """Of `ids`."""
    g, lse = upstream, h.z.logsumexp(-1)
    into = {"logprob": -(1 - label_smoothing) * probs * g[:, None], "lse": 2 * z_loss * lse * g}
    gradient, error = bounds_selected.selected_dlogits(h, at, into)
    lse_error = bounds_selected.selected(h, at)["lse"]
    error = error + (2 * z_loss * g.abs() * lse_error)[:, None] * h.z.softmax(-1)
    if not label_smoothing:
        return _alone(gradient, error)
    sizes = into["logprob"].abs().sum(-1) + into["lse"].abs()
    return _with_uniform(h, gradient, error, sizes, uniform, label_smoothing * g)


def squared(lse: Tensor, error: Tensor, z_loss: float) -> Tensor:
    """(N,) of the z-loss."""
    return z_loss * (2 * lse.abs() + error) * error


def _lse_error(h: Head) -> Tensor:
    size = 1 + h.z.logsumexp(-1).abs()
    return h.lse_error + h.units.sum * ARITHMETIC * size + h.sum_error


def _uniform(h: Head, class_weight: Tensor, products: Tensor | None) -> Tensor:
    """(N,) of the loss against uniform targets.

    Without softcap the logits are summed as one product of hidden and a sum of rows of the head.
    """
    q = (class_weight / h.z.shape[1]).expand(h.z.shape)
    if products is None:
        return probabilities(h, q, 0.0)
    of_sum = bounds.products_unit(h.z.shape[1], h.units.sum) * (q * products).sum(-1)
    return (q * h.error).sum(-1) + q.sum(-1) * _lse_error(h) + of_sum


def _alone(gradient: Tensor, error: Tensor) -> Dlogits:
    return Dlogits(gradient.abs(), error, gradient.abs())


def _with_uniform(
    h: Head,
    gradient: Tensor,
    error: Tensor,
    sizes: Tensor,  # (N,) of the coefficients of p in `gradient`
    class_weight: Tensor,
    upstream: Tensor,
) -> Dlogits:
    """Beside a gradient that of uniform targets: both are rounded, then added."""
    more = probabilities_dlogits(h, (class_weight / h.z.shape[1]).expand(h.z.shape), upstream, 0.0)
    # Or coefficients of p are added up first, which may cancel.
    joined = ARITHMETIC * h.units.sum * sizes[:, None] * h.z.softmax(-1)
    size = gradient.abs() + more.terms
    return Dlogits(size, error + more.error + joined, size)
