"""A chunk of products overwritten by its gradient, or by probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.reference.chunk import logits, target_columns
from ift_kernels.common.transform import LogitTransform


def dlogits_(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    norm: Tensor,
    coef: Tensor,
    transposed: Tensor | None = None,
) -> None:
    """Overwrite raw products with their gradient, in place; write it to `transposed` (C, N) too.

    With log p = z − norm[0] − norm[1] and the rows (c_target, c_prob, c_plogp, c_uniform) of
    `coef` (4, N):
    ``dx = ∂z/∂x · (c_target·1[j = target] + p·(c_prob + c_plogp·log p) + c_uniform)``.
    """
    z = logits(x, bias, transform)
    c_target, c_prob, c_plogp, c_uniform = coef.to(z.dtype)[:, :, None]
    log_p = (z - norm[0].to(z.dtype)[:, None]) - norm[1].to(z.dtype)[:, None]
    p = log_p.exp()
    grad = p * (c_prob + c_plogp * torch.where(p == 0, 0.0, log_p)) + c_uniform
    inside, local = target_columns(target, offset, x.shape[1])
    grad.scatter_add_(1, local[:, None], torch.where(inside[:, None], c_target, 0.0))
    grad = grad * transform.derivative(z)
    x.copy_(torch.where((coef == 0).all(0)[:, None], 0.0, grad))  # also where the row has a NaN
    if transposed is not None:
        transposed.copy_(x.T)


def probabilities_(x: Tensor, bias: Tensor | None, transform: LogitTransform, norm: Tensor) -> None:
    """Overwrite raw products with ``exp(z − norm[0] − norm[1])``, in place."""
    z = logits(x, bias, transform)
    x.copy_(((z - norm[0].to(z.dtype)[:, None]) - norm[1].to(z.dtype)[:, None]).exp())
