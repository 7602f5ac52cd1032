"""A chunk of products overwritten by its gradient, or by probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import Chunk, RowGradient
from ift_kernels.backends.reference.chunk import logits, target_columns


def dlogits_(chunk: Chunk, row_gradient: RowGradient, transposed: Tensor | None = None) -> None:
    """Overwrite raw products with their gradient, in place; write it to `transposed` (C, N) too.

    With log p = z − norm[0] − norm[1] and the rows (c_target, c_prob, c_plogp, c_uniform) of
    `coef` (4, N):
    ``dx = ∂z/∂x · (c_target·(1[j = target] − p) + p·(c_prob + c_plogp·log p) + c_uniform)``.
    For the target 1 − p is −expm1(log p): next to 1, p has nothing left of it.
    """
    z, (target, norm, coef) = logits(chunk), row_gradient
    c_target, c_prob, c_plogp, c_uniform = coef.to(z.dtype)[:, :, None]
    log_p = (z - norm[0].to(z.dtype)[:, None]) - norm[1].to(z.dtype)[:, None]
    p = log_p.exp()
    tail = c_plogp * torch.where(p == 0, 0.0, log_p)
    grad = p * ((c_prob - c_target) + tail) + c_uniform
    inside, local = target_columns(chunk, target)
    at = local[:, None]
    log_p, p, tail = (value.gather(1, at) for value in (log_p, p, tail))
    own = p * (c_prob + tail) - c_target * log_p.expm1() + c_uniform
    grad.scatter_(1, at, torch.where(inside[:, None], own, grad.gather(1, at)))
    grad = grad * chunk.transform.derivative(z)
    no_upstream = (coef == 0).all(0)[:, None]
    chunk.x.copy_(torch.where(no_upstream, 0.0, grad))  # also where the row has a NaN
    if transposed is not None:
        transposed.copy_(chunk.x.T)


def probabilities_(chunk: Chunk, norm: Tensor) -> None:
    """Overwrite raw products with ``exp(z − norm[0] − norm[1])``, in place."""
    z = logits(chunk)
    chunk.x.copy_(((z - norm[0].to(z.dtype)[:, None]) - norm[1].to(z.dtype)[:, None]).exp())


def softmax_gradient_(
    chunk: Chunk,
    d_prob: Tensor,  # (N, C) gradient by the probabilities p; work memory
    norm: Tensor,  # (2, N) as of `probabilities_`
    centre: Tensor,  # (N,) Σ p·d_prob over the whole vocabulary
    prob: Tensor | None = None,  # (N, C)
) -> None:
    """Overwrite raw products with ``∂z/∂x · p·(d_prob − centre)``; write p to `prob` too.

    The difference is formed before it is rounded: of a nearly certain token the two cancel.
    """
    z = logits(chunk)
    p = (z - norm[0].to(z.dtype)[:, None]).sub_(norm[1].to(z.dtype)[:, None]).exp_()
    if prob is not None:
        prob.copy_(p)
    dz = d_prob.sub_(centre.to(d_prob.dtype)[:, None]).mul_(p)
    chunk.x.copy_(dz.mul_(chunk.transform.derivative(z)))
