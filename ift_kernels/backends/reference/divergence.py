"""The divergence of two heads in plain torch: the executable specification, see backends.contract.

With s, t the log-probabilities of student and teacher, p = eˢ, q = eᵗ and m = (1 − β)p + βq, the
terms of a row's divergence and its gradient by the student's logits are::

    forward  Σ q(t − s)                                dz = p − q
    reverse  Σ p(s − t)                                dz = p·((s − t) − Σ p(s − t))
    jsd      Σ (1 − β)p(s − log m) + βq(t − log m)     dz = (1 − β)p·((s − log m) − Σ p(s − log m))

What is subtracted in dz is the row's *centre*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.reference.chunk import logits


def divergence_terms(
    student: Chunk,
    teacher: Chunk,
    kind: str,
    beta: float,
    norm: Tensor,  # (2, 2, N): of student and teacher, maximum and log of the sum of exponentials
    value: Tensor,  # (N,) float64
    centre: Tensor,  # (N,) float64
) -> None:
    """Add a tile's terms of the divergence and of the centre (0 for "forward"), in place."""
    _, s, t = _log_probs(student, teacher, norm)
    if kind == "forward":
        value += _forward_terms(s, t)
        return
    if kind == "reverse":
        of_student = _times(s.exp(), s - t).sum(1, dtype=torch.float64)
        value += of_student
    else:
        parts = zip((s, t), _over_mixture(s, t, beta), strict=True)
        sums = (_times(a.exp(), over).sum(1, dtype=torch.float64) for a, over in parts)
        of_student, of_teacher = sums
        value += (1 - beta) * of_student + beta * of_teacher
    centre += of_student


def divergence_gradient_(
    student: Chunk,
    teacher: Chunk,
    kind: str,
    beta: float,
    norm: Tensor,
    centre: Tensor,  # (N,) float64, unused by "forward"
    upstream: Tensor,  # (N,)
    value: Tensor | None = None,  # (N,) float64
) -> None:
    """Overwrite the student's products with their gradient, in place: 0 where `upstream` is.

    Of "forward", which needs no centre, the terms are added to `value` on the way.
    """
    z, s, t = _log_probs(student, teacher, norm)
    centre, upstream = (row.to(s.dtype)[:, None] for row in (centre, upstream))
    p = s.exp()
    if kind == "forward":
        dz = p - t.exp()
        if value is not None:
            value += _forward_terms(s, t)
    elif kind == "reverse":
        dz = _times(p, s - t - centre)
    else:
        dz = _times((1 - beta) * p, _over_mixture(s, t, beta)[0] - centre)
    dz = dz * upstream * student.transform.derivative(z)
    student.x.copy_(torch.where(upstream == 0, 0.0, dz))  # also where the row has a NaN


def transpose(x: Tensor, out: Tensor) -> None:
    """Copy x (N, C) to `out` (C, N)."""
    out.copy_(x.T)


def _log_probs(student: Chunk, teacher: Chunk, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student's logits and both log-probabilities."""
    z, y = logits(student), logits(teacher)
    norm = norm.to(z.dtype)[..., None]
    s, t = ((a - top) - log_sum for a, (top, log_sum) in zip((z, y.to(z.dtype)), norm, strict=True))
    return z, s, t


def _forward_terms(s: Tensor, t: Tensor) -> Tensor:
    return _times(t.exp(), t - s).sum(1, dtype=torch.float64)


def _over_mixture(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """s − log m and t − log m, relative to the larger of s and t: neither loses digits to them."""
    d = t - s
    mostly_student, e = d <= 0, (-d.abs()).exp()
    log_mix = torch.where(mostly_student, (1 - beta) + beta * e, beta + (1 - beta) * e).log()
    return (
        torch.where(mostly_student, 0.0, -d) - log_mix,
        torch.where(mostly_student, d, 0.0) - log_mix,
    )


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p·x with 0 where p is 0, whatever x: both heads may rule out a token with −∞."""
    return torch.where(p == 0, 0.0, p * x)
