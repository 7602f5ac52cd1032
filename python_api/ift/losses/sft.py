"""The loss of supervised fine-tuning on per-token log-probabilities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ift.losses._module import Loss
from ift.losses._reduce import divide, mean_over_rows
from ift.losses._tokens import Metrics, Tokens, record_tokens
from ift.losses.preference import not_negative
from ift_kernels.common import checks

Reduction = Literal["mean", "sum", "row_mean", "none"]
REDUCTIONS = ("mean", "sum", "row_mean", "none")
SCALINGS = ("none", "dft")


def sft_loss(
    logprob: Tensor,  # (B, T) or (T,)
    mask: Tensor,
    *,
    num_items: float | Tensor | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scaling: Literal["none", "dft"] = "none",
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    mean_logit: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_rows: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """Negative log-likelihood of the response tokens.

    In eager torch, with every masked position 0::

        loss = -logprob
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - mean_logit)
        loss = loss + z_loss * lse.square()
        loss = loss * weights * logprob.exp().detach()         # the last for scaling "dft"
        mean      loss.sum() / mask.sum()                      # or / num_items
        sum       loss.sum()
        row_mean  (loss.sum(-1) / mask.sum(-1)).mean()         # what IFT is without its two parts
        none      loss

    Args:
        logprob: log-probability of each target, already shifted, (B, T), or (T,) for one row or
            packed documents; fp32, bf16, fp16 or fp64. Values at masked positions are never read.
        mask: same shape; bool, or 0/1 of any dtype: which positions are response tokens.
        num_items: for "mean", divide by this instead of by the tokens here: under gradient
            accumulation, the response tokens of the whole optimizer step.
        reduction: above. "row_mean" is over the rows that have response tokens.
        label_smoothing: weight in [0, 1) of the uniform distribution. Default 0.
        z_loss: coefficient ≥ 0 of the squared log-sum-exp. Default 0.
        scaling: "dft" multiplies each token by its probability, a constant (Dynamic Fine-Tuning,
            arXiv 2508.05629): the gradient on logits is p[target] · (p − e). Default "none".
        weights: per token, shape of `logprob`, or (rows,); constants or not. Default 1.
        lse, mean_logit: of the logits, shape of `logprob`, as `ift_kernels.linear_logprobs` gives;
            needed for label smoothing (both) and z-loss (the first).
        cu_seqlens: (documents + 1,) int32 or int64: the rows of "row_mean" are packed documents.
        num_rows: for "row_mean", divide by this, as in `ift_loss`.
        metrics: a dict that gets ``tokens`` and ``perplexity``, detached.

    Returns:
        Scalar, or the shape of `logprob` for "none"; fp64 for fp64 and fp32 otherwise. 0 where
        there is no response token.

    Raises:
        TypeError, ValueError: unknown reduction, shapes that do not match, malformed `cu_seqlens`,
            a divisor that is negative or that the reduction does not use, options out of range.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("scaling", scaling, SCALINGS)
    tokens = Tokens(logprob, mask, cu_seqlens)
    for name, value, user in (("num_items", num_items, "mean"), ("num_rows", num_rows, "row_mean")):
        if value is not None and reduction != user:
            raise ValueError(f"{name}: expected None with reduction {reduction!r}, got {value}")
    if not 0 <= checks.number("label_smoothing", label_smoothing) < 1:
        raise ValueError(f"label_smoothing: expected in [0, 1), got {label_smoothing}")
    not_negative("z_loss", z_loss)
    loss = torch.where(tokens.mask, -tokens.logprob, 0)
    if label_smoothing or z_loss:
        if lse is None:
            raise ValueError("lse: expected a tensor with label_smoothing or z_loss, got None")
        lse = tokens.like("lse", lse)
    if label_smoothing and lse is not None:
        if mean_logit is None:
            raise ValueError("mean_logit: expected a tensor with label_smoothing, got None")
        flat = lse - tokens.like("mean_logit", mean_logit)
        loss = (1 - label_smoothing) * loss + label_smoothing * flat
    if z_loss and lse is not None:
        loss = loss + z_loss * lse.square()
    if scaling == "dft":
        loss = loss * tokens.logprob.detach().exp()
    if weights is not None:
        loss = loss * tokens.each("weights", weights)
    record_tokens(metrics, tokens)
    if reduction == "none":
        return loss
    if reduction == "row_mean":
        return mean_over_rows(tokens.means(loss), tokens.counts, num_rows)
    if reduction == "sum":
        return loss.sum()
    return divide(loss.sum(), "num_items", tokens.total if num_items is None else num_items)


class SFTLoss(Loss):
    """`sft_loss` with its options held by a module; call it on ``(logprob, mask)``.

    Args:
        reduction, label_smoothing, z_loss, scaling: as in `sft_loss`.
    """

    function = staticmethod(sft_loss)

    reduction: Reduction = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scaling: Literal["none", "dft"] = "none"
