"""Dynamic relation propagation of Intuitive Fine-Tuning: discounted sums, and weights made of them.

Source: *Intuitive Fine-Tuning: Towards Simplifying Alignment into a Single Process*
(arXiv 2405.11870), and its released code for the options of `propagation_weights`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ift_kernels import backends
from ift_kernels.common import checks
from ift_kernels.common.packed_rows import Rows
from ift_kernels.operators import library

__all__ = ["discounted_cumsum", "propagation_weights"]

Side = Literal["left", "right"]
Kind = Literal["loss", "logps", "mask"]
Norm = Literal["L1", "L2", "softmax", "log"]
SIDES = ("left", "right")
KINDS = ("loss", "logps", "mask")
NORMS = ("L1", "L2", "softmax", "log")

# What the released code puts at masked positions before it takes the smallest value, side "right".
_OFF_MASK = 1e6


def discounted_cumsum(
    x: Tensor,  # (B, T) or (T,)
    gamma: float,
    side: Side = "left",
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Discounted sums along each row, in O(T), with distances that count masked positions too.

    In eager torch, with ``U[t, j] = gamma ** (j - t)`` for ``j >= t`` and 0 elsewhere, row by row::

        left:   mask * (U   @ (mask * x))     # suffix sums: what follows t
        right:  mask * (U.T @ (mask * x))     # prefix sums: what precedes t

    One side is the adjoint of the other, so the gradient is the same operation with the side
    swapped, and may itself be differentiated. Values at masked positions are never read: NaN there
    stays there.

    Args:
        x: values, (B, T), or (T,) for one row; fp32, bf16, fp16 or fp64. Summed in at least fp32.
        gamma: discount per position, in [0, 1]; 1 is a plain cumulative sum, 0 the identity.
        side: "left" or "right", above.
        mask: same shape; bool, or 0/1 of any dtype. None: every position counts.
        cu_seqlens: (documents + 1,) int32 or int64: the flattened positions are documents
            ``[cu[i], cu[i+1])`` packed behind one another, and no sum crosses a boundary.

    Returns:
        The sums, in the shape and dtype of `x`.

    Raises:
        TypeError: `x` not floating point, `gamma` not a number, `cu_seqlens` not int32 or int64.
        ValueError: `gamma` outside [0, 1], an unknown `side`, shapes that do not match, or
            `cu_seqlens` that decrease or do not cover the positions.
    """
    gamma = checks.unit_interval("gamma", gamma)
    checks.one_of("side", side, SIDES)
    checks.per_token("x", x)
    if mask is not None:
        mask = checks.as_bool_mask(mask, x, "x")
    if cu_seqlens is not None:
        cu_seqlens = checks.seqlens(cu_seqlens, x)
    rows = (1, x.numel()) if x.dim() == 1 or cu_seqlens is not None else x.shape
    flat_mask = None if mask is None else mask.reshape(rows)
    op = torch.ops.ift_kernels.discounted_cumsum
    out: Tensor = op(x.reshape(rows), flat_mask, cu_seqlens, gamma, side == "left")
    return out.reshape(x.shape)


def propagation_weights(
    logprob: Tensor,  # (B, T) or (T,)
    mask: Tensor,
    *,
    gamma: float = 0.95,
    kind: Kind = "loss",
    side: Side = "left",
    norm: Norm = "L1",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The weight of each response token in the released IFT loss; N in all, the tokens of the row.

    In eager torch, per row, with ``loss = -logprob`` and every masked position 0::

        item = {"loss": loss / N, "logps": loss, "mask": mask}[kind]
        c = discounted_cumsum(item, gamma, side, mask=mask)
        if side == "right":
            c = c + smallest        # the smallest c other than 0 in the *whole batch*: couples rows
        v = {"L1": c, "L2": c**2, "softmax": c.exp(), "log": (c + 1).log()}[norm]       # left
        v = {"L1": 1/c, "L2": 1/c**2, "softmax": (1/c).exp(), "log": 1/(c + 1).log()}[norm]  # right
        w = mask * N * v / (mask * v).sum()

    The released code does not detach these weights, so neither is that done here:
    ``.detach()`` them where a plain weighted loss is wanted.

    Args:
        logprob: log-probability of each target, (B, T), or (T,) for one row; fp32, bf16, fp16 or
            fp64. Values at masked positions are never read.
        mask: same shape; bool, or 0/1 of any dtype: which positions are response tokens.
        gamma: discount per position, in [0, 1], default 0.95 as released. 0 gives every response
            token the weight 1 whatever the other options, which is not the limit of small values.
        kind: what is propagated. "loss" (default) and "logps" differ only where the scale matters:
            norms "softmax" and "log", and side "right".
        side: "left" (default): a token weighs by the losses that follow it; "right": by the inverse
            of the losses that precede it.
        norm: sharpness: "log" is flatter than "L1" (default), "L2" sharper; "softmax" depends on
            the scale of the losses.
        cu_seqlens: (documents + 1,) int32 or int64, as in `discounted_cumsum`.

    Returns:
        Weights in the shape of `logprob`, fp64 for fp64 and fp32 otherwise; 0 at masked positions,
        and in rows where every v is 0 (no response token, or none with a loss).

    Raises:
        TypeError, ValueError: as `discounted_cumsum`; unknown `kind` or `norm`.
    """
    gamma = checks.unit_interval("gamma", gamma)
    checks.one_of("kind", kind, KINDS)
    checks.one_of("side", side, SIDES)
    checks.one_of("norm", norm, NORMS)
    checks.per_token("logprob", logprob)
    mask = checks.as_bool_mask(mask, logprob, "logprob")
    rows = Rows(logprob, cu_seqlens)
    ones = mask.to(torch.float64 if logprob.dtype == torch.float64 else torch.float32)
    if gamma == 0.0 or logprob.numel() == 0:
        return ones
    tokens = rows.spread(rows.sum(ones).clamp(min=1))
    item = ones if kind == "mask" else torch.where(mask, -logprob.to(ones.dtype), 0)
    if kind == "loss":
        item = item / tokens
    c = discounted_cumsum(item, gamma, side, mask=mask, cu_seqlens=cu_seqlens)
    if side == "right":
        least = torch.where(mask & (c != 0), c, _OFF_MASK).amin()
        c = 1 / torch.where(mask, c + least, 1)  # 1: an inverse that masked gradients survive
    v = _normed(c, mask, rows, norm, inverse=side == "right")
    total = rows.sum(v)
    total = torch.where(total == 0, 1, total)  # 0/0 of a row without losses; NaN stays NaN
    return v / rows.spread(total) * tokens


def _normed(c: Tensor, mask: Tensor, rows: Rows, norm: Norm, *, inverse: bool) -> Tensor:
    """Unnormalised weights v of the sums `c`, given as 1/c where `inverse`; 0 off the mask."""
    if norm == "L2":
        c = c.square()
    elif norm == "softmax":
        # Any shift per row cancels in v / Σv; this one keeps exp finite.
        peak = rows.amax(torch.where(mask, c, -torch.inf))
        c = (c - rows.spread(torch.where(peak == -torch.inf, 0, peak))).exp()
    elif norm == "log":
        c = 1 / torch.log1p(1 / c) if inverse else torch.log1p(c)
    return torch.where(mask, c, 0)


# The operation below works on (R, T) rows; with cu_seqlens, int64, R = 1.


def _forward(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float, left: bool
) -> Tensor:
    x = x.contiguous()
    if x.numel() == 0:
        return torch.empty_like(x)
    if cu_seqlens is not None:
        cu_seqlens = checks.seqlens(cu_seqlens, x)  # again: a compiled caller could not
    out: Tensor = backends.get(x).scan(x, mask, cu_seqlens, gamma, left)
    return out.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, cu_seqlens, ctx.gamma, ctx.left = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, cu_seqlens)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None or not ctx.needs_input_grad[0]:
        return None, None, None, None, None
    mask, cu_seqlens = ctx.saved_tensors
    op = torch.ops.ift_kernels.discounted_cumsum  # differentiable again: the map is linear
    return op(grad, mask, cu_seqlens, ctx.gamma, not ctx.left), None, None, None, None


library.register(
    "discounted_cumsum(Tensor x, Tensor? mask, Tensor? cu_seqlens, float gamma, bool left)"
    " -> Tensor",
    _forward,
    lambda x, mask, cu_seqlens, gamma, left: x.new_empty(x.shape),
    _backward,
    _setup,
    linear=True,
)
