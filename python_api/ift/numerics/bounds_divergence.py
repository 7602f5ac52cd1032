"""Bounds of what is a mean over predictions: the divergence of two heads, expected embeddings."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ift.numerics.bounds import ARITHMETIC, Head, finite, product_errors, products_unit


class Divergence(NamedTuple):
    """Errors of the divergence of two heads, and the gradients of the student's logits."""

    value: Tensor  # (N,) errors
    gradient: Tensor  # (N, V) exact, for an upstream gradient of 1
    error: Tensor  # (N, V) its errors


def divergence(student: Head, teacher: Head, kind: str, beta: float) -> Divergence:
    """Of a `kind` as in `oracle.divergence`."""
    s, t = student.z.log_softmax(-1), teacher.z.log_softmax(-1)
    p, q = s.exp(), t.exp()
    p_error, q_error = student.probability_error(), teacher.probability_error()
    unit = student.units.sum
    s_error, t_error = (
        h.error + h.lse_error[:, None] + h.units.sum * ARITHMETIC * (1 + finite(x).abs())
        for h, x in ((student, s), (teacher, t))
    )
    if kind == "forward":
        value = _mean_error(q, q_error, finite(t - s), s_error + t_error)
        return Divergence(value, p - q, p_error + q_error + ARITHMETIC * unit * (p + q))
    if kind == "reverse":
        gap, gap_error = finite(s - t), s_error + t_error
        value = _mean_error(p, p_error, gap, gap_error)
        return Divergence(value, *_centred(p, p_error, gap, gap_error, value))
    m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    gaps = finite(s - m), finite(t - m)
    m_error = torch.maximum(s_error, t_error)
    of_student = _mean_error(p, p_error, gaps[0], s_error + m_error)
    of_teacher = _mean_error(q, q_error, gaps[1], t_error + m_error)
    gradient, error = _centred(p, p_error, gaps[0], s_error + m_error, of_student)
    value = (1 - beta) * of_student + beta * of_teacher
    return Divergence(value, (1 - beta) * gradient, (1 - beta) * error)


def _mean_error(p: Tensor, p_error: Tensor, x: Tensor, x_error: Tensor) -> Tensor:
    """(N,) of Σ p·x."""
    return (p_error * x.abs() + (p + p_error) * x_error).sum(-1)


def _centred(
    p: Tensor, p_error: Tensor, x: Tensor, x_error: Tensor, mean_error: Tensor
) -> tuple[Tensor, Tensor]:
    """p·(x − Σ p·x), the derivative of Σ p·x by logits at fixed x, and its error."""
    deviation = x - (p * x).sum(-1, keepdim=True)
    moved = x_error + mean_error[:, None]
    return p * deviation, p_error * deviation.abs() + (p + p_error) * moved


class Embedding(NamedTuple):
    """Errors of an expected embedding, and the gradients of its logits."""

    value: Tensor  # (N, E) errors
    gradient: Tensor  # (N, V) exact
    error: Tensor  # (N, V) its errors
    table: Tensor  # (V, E) errors of the gradient of the embedding


def expected_embedding(h: Head, embedding: Tensor, upstream: Tensor) -> Embedding:
    """Of `embedding` (V, E) and the gradient `upstream` (N, E) into the result."""
    p, p_error, units = h.z.softmax(-1), h.probability_error(), h.units
    read = p_error + units.dlogit * p + torch.where(p > 0, units.underflow, 0)
    value = product_errors(read, p, embedding, units)
    x = upstream @ embedding.T
    x_error = products_unit(embedding.shape[1], units.sum) * upstream.abs() @ embedding.abs().T
    centre_error = (value * upstream.abs()).sum(-1)
    gradient, error = _centred(p, p_error, x, x_error, centre_error)
    error = error + ARITHMETIC * units.sum * p * x.abs()
    return Embedding(value, gradient, error, product_errors(read.T, p.T, upstream, units))
