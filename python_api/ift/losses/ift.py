"""The loss of Intuitive Fine-Tuning on per-token log-probabilities.

Source: *Intuitive Fine-Tuning: Towards Simplifying Alignment into a Single Process*
(arXiv 2405.11870) and its released code, which differ: hence three objectives.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ift.losses._module import Loss
from ift.losses._reduce import mean_over_rows
from ift.losses._tokens import Metrics, Tokens, record_tokens
from ift_kernels import discounted_cumsum, propagation_weights
from ift_kernels.common import checks
from ift_kernels.propagation import KINDS, NORMS, SIDES, Kind, Norm, Side

Objective = Literal["released", "paper", "algorithm1"]
OBJECTIVES = ("released", "paper", "algorithm1")


def ift_loss(
    logprob: Tensor,  # (B, T) or (T,)
    mask: Tensor,
    *,
    gamma: float = 0.95,
    objective: Objective = "released",
    propagation: Kind = "loss",
    side: Side = "left",
    norm: Norm = "L1",
    detach_weights: bool = False,
    cu_seqlens: Tensor | None = None,
    num_rows: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    metrics: Metrics | None = None,
) -> Tensor:
    """IFT loss: per-token losses weighted by the losses that follow, as a mean over rows.

    In eager torch, per row, with ``loss = -logprob`` and every masked position 0::

        released    (weights(logprob) * loss).sum() / N     # propagation_weights; Σ weights = N
        paper       (discounted_cumsum(mask, gamma, "right") * loss).sum()        # equation 21
        algorithm1  (discounted_cumsum(loss, gamma, "left") * loss).sum()

    The objectives are not equivalent. ``released``, the default, is what the released code trains:
    for constant losses early tokens weigh most. In ``paper`` late tokens weigh most. Neither
    ``paper`` nor ``algorithm1`` is normalised by length.

    In ``released`` the weights are part of the gradient, as in the released code. At the defaults::

        d L / d loss[k] = (c[k] + p[k] - L * u[k]) / S,    S = Σ c
        c = mask * (U @ loss),  p = mask * (U.T @ loss),  u = mask * (U.T @ mask)

    This is *negative* on easy spans: where the losses around k lie well below the row's L, training
    makes easy tokens less likely. ``detach_weights=True`` gives ``c[k] / S``, never negative.

    Args:
        logprob: log-probability of each target, already shifted, (B, T), or (T,) for one row or
            packed documents; fp32, bf16, fp16 or fp64. Values at masked positions are never read.
        mask: same shape; bool, or 0/1 of any dtype: which positions are response tokens.
        gamma: discount per position, in [0, 1], default 0.95 as released. At 0 ``released`` is
            supervised fine-tuning: the mean over rows of their means.
        objective: "released", "paper" or "algorithm1", above.
        propagation: kind of weights, "loss", "logps" or "mask"; as `side` and `norm` described at
            `ift_kernels.propagation_weights`; ``released`` only.
        side: "left" or "right".
        norm: "L1", "L2", "softmax" or "log".
        detach_weights: keep the weights out of the gradient; default False, as released.
        cu_seqlens: (documents + 1,) int32 or int64: the rows are packed documents, one after
            another, with the values and gradients of the same documents padded.
        num_rows: divide the sum over rows by this instead of by the rows that have response tokens
            here. Under gradient accumulation or data parallelism, pass the number of such rows in
            the whole optimizer step, per rank if ranks are averaged.
        reduction: "mean" over rows, or "none" for each row's loss.
        metrics: a dict that gets ``tokens`` and ``perplexity``, detached.

    Returns:
        Scalar, or (rows,); fp64 for fp64 and fp32 otherwise. Rows without response tokens are 0 and
        do not count in the mean; rows whose losses are all 0 are 0. Both have finite gradients.

    Raises:
        TypeError, ValueError: unknown option, `gamma` outside [0, 1], shapes that do not match,
            malformed `cu_seqlens`, negative `num_rows`, `num_rows` without a mean; an option that
            the objective does not have.
    """
    check_objective(objective, propagation, side, norm)
    checks.one_of("reduction", reduction, ("mean", "none"))
    tokens = Tokens(logprob, mask, cu_seqlens)
    mask = tokens.mask
    loss = torch.where(mask, -tokens.logprob, 0)
    if objective == "released":
        weights = propagation_weights(
            tokens.logprob,
            mask,
            gamma=gamma,
            kind=propagation,
            side=side,
            norm=norm,
            cu_seqlens=cu_seqlens,
        )
    elif objective == "paper":
        weights = discounted_cumsum(
            mask.to(loss.dtype), gamma, "right", mask=mask, cu_seqlens=cu_seqlens
        )
    else:
        weights = discounted_cumsum(loss, gamma, "left", mask=mask, cu_seqlens=cu_seqlens)
    weighted = (weights.detach() if detach_weights else weights) * loss
    per_row = tokens.means(weighted) if objective == "released" else tokens.sums(weighted)
    record_tokens(metrics, tokens)
    if reduction == "mean":
        return mean_over_rows(per_row, tokens.counts, num_rows)
    if num_rows is not None:
        raise ValueError("num_rows: expected None with reduction 'none', which divides nothing")
    return per_row


def check_objective(objective: str, propagation: str, side: str, norm: str) -> None:
    """Raise a ValueError for an unknown option, or one that `objective` does not have."""
    checks.one_of("objective", objective, OBJECTIVES)
    checks.one_of("propagation", propagation, KINDS)
    checks.one_of("side", side, SIDES)
    checks.one_of("norm", norm, NORMS)
    if objective == "released":
        return
    released_only = (
        ("propagation", propagation, "loss"),
        ("side", side, "left"),
        ("norm", norm, "L1"),
    )
    for name, value, default in released_only:
        if value != default:
            raise ValueError(
                f"{name}: expected {default!r} with objective {objective!r}, which has no other, "
                f"got {value!r}"
            )


class IFTLoss(Loss):
    """`ift_loss` with its options held by a module; call it on ``(logprob, mask)``.

    Args:
        gamma, objective, propagation, side, norm, detach_weights, reduction: as in `ift_loss`.
    """

    function = staticmethod(ift_loss)

    gamma: float = 0.95
    objective: Objective = "released"
    propagation: Kind = "loss"
    side: Side = "left"
    norm: Norm = "L1"
    detach_weights: bool = False
    reduction: Literal["mean", "none"] = "mean"
