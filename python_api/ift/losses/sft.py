"""The loss of supervised fine-tuning on per-token log-probabilities."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ift.losses._module import Loss
from ift.losses._reduce import divide, mean_over_rows
from ift.losses._tokens import Metrics, Tokens, check_given, record, record_tokens
from ift.losses.preference import not_negative
from ift_kernels.common import checks

Reduction = Literal["mean", "sum", "row_mean", "none"]
REDUCTIONS = ("mean", "sum", "row_mean", "none")
Scaling = Literal["none", "dft", "deft", "eaft"]
SCALINGS = ("none", "dft", "deft", "eaft")
EAFT_ENTROPY = math.log(20)  # the largest of 20 tokens


def sft_loss(
    logprob: Tensor,  # (B, T) or (T,)
    mask: Tensor,
    *,
    num_items: float | Tensor | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scaling: Scaling = "none",
    kl_coef: float = 0.0,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    mean_logit: Tensor | None = None,
    entropy: Tensor | None = None,
    sum_sq: Tensor | None = None,
    reference_kl: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_rows: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """Negative log-likelihood of the response tokens, and what is trained in its place.

    In eager torch, with every masked position 0 and ``a = sum_sq``::

        loss = -logprob
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - mean_logit)
        loss = loss + z_loss * lse.square()
        dft       loss = loss * logprob.exp().detach()
        deft      loss = (1 - exp(a * logprob)) / a                     # in place of -logprob
        eaft      loss = loss * (entropy / log(20)).clamp(max=1)        # a constant
        loss = (loss + kl_coef * reference_kl) * weights
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
        scaling: how much each token counts; default "none", alike. "dft", its probability (Dynamic
            Fine-Tuning, arXiv 2508.05629): the gradient on logits is p[target] · (p − e). "deft",
            that to the power of Σp² (Dynamic Entropy Fine-Tuning, arXiv 2602.11424); not with label
            smoothing. "eaft", the entropy over that of 20 even tokens, at most 1 (Entropy-Adaptive
            Fine-Tuning, arXiv 2601.02151). All are constants in the gradient.
        kl_coef: at least 0, weight of the KL from a frozen model; default 0. With "dft" it is
            Anchored SFT (arXiv 2509.23753), whose code has 0.1.
        weights: per token, shape of `logprob`, or (rows,); constants or not. Default 1.
        lse, mean_logit: of the logits, shape of `logprob`, as `ift_kernels.linear_logprobs` gives;
            needed for label smoothing (both) and z-loss (the first).
        entropy: of the distributions, likewise, for "eaft" alone. The published code approximates
            it by the entropy among the 20 largest logits; that may be given, too.
        sum_sq: Σp² of the distributions, likewise, for "deft" alone.
        reference_kl: KL(frozen model ‖ this one) of each token, of `ift_kernels.linear_divergence`
            with ``reduction="none"``, for `kl_coef`. `from_hidden` computes it from a `Head` given
            as `reference`.
        cu_seqlens: (documents + 1,) int32 or int64: the rows of "row_mean" are packed documents.
        num_rows: for "row_mean", divide by this, as in `ift_loss`.
        metrics: a dict that gets ``tokens`` and ``perplexity``, detached; with `kl_coef` ``kl``.

    Returns:
        Scalar, or the shape of `logprob` for "none"; fp64 for fp64 and fp32 otherwise. 0 where
        there is no response token, and for a token that "dft" or "eaft" scales by 0, even if its
        `logprob` is −∞.

    Raises:
        TypeError, ValueError: unknown reduction, shapes that do not match, malformed `cu_seqlens`,
            a divisor that is negative or that the reduction does not use, options out of range, one
            without the tensor that it needs, a tensor without its option.

    >>> logprob, mask = torch.tensor([0.9, 0.1]).log(), torch.ones(2)
    >>> for scaling, more in (("dft", {}), ("deft", {"sum_sq": torch.tensor([0.8, 0.8])})):
    ...     print(sft_loss(logprob, mask, reduction="none", scaling=scaling, **more))
    tensor([0.0948, 0.2303])
    tensor([0.1010, 1.0519])
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
    not_negative("kl_coef", kl_coef)
    if scaling == "deft" and label_smoothing:
        raise ValueError(f"label_smoothing: expected 0 with scaling 'deft', got {label_smoothing}")
    for name, given, user in (("entropy", entropy, "eaft"), ("sum_sq", sum_sq, "deft")):
        if given is not None and scaling != user:
            raise ValueError(f"{name}: expected None with scaling {scaling!r}, got a tensor")
    check_given("lse", lse, "label_smoothing or z_loss", bool(label_smoothing or z_loss))
    check_given("mean_logit", mean_logit, "label_smoothing", label_smoothing > 0)
    check_given("reference_kl", reference_kl, "kl_coef", kl_coef > 0)
    loss = torch.where(tokens.mask, -tokens.logprob, 0)
    if scaling == "deft":
        focus = tokens.like("sum_sq", _given("sum_sq", sum_sq, "scaling 'deft'")).detach()
        some = torch.where(focus == 0, 1, focus)
        loss = torch.where(focus == 0, loss, -torch.expm1(some * tokens.logprob) / some)
    if label_smoothing or z_loss:
        lse = tokens.like("lse", _given("lse", lse, "label_smoothing or z_loss"))
    if label_smoothing and lse is not None:
        mean_logit = _given("mean_logit", mean_logit, "label_smoothing")
        flat = lse - tokens.like("mean_logit", mean_logit)
        loss = (1 - label_smoothing) * loss + label_smoothing * flat
    if z_loss and lse is not None:
        loss = loss + z_loss * lse.square()
    if scaling == "dft":
        loss = _scaled(loss, tokens.logprob.detach().exp())
    elif scaling == "eaft":
        uncertainty = tokens.like("entropy", _given("entropy", entropy, "scaling 'eaft'"))
        loss = _scaled(loss, (uncertainty.detach() / EAFT_ENTROPY).clamp(0, 1))
    if kl_coef:
        kl = tokens.like("reference_kl", _given("reference_kl", reference_kl, "kl_coef"))
        record(metrics, kl=tokens.mean(kl))
        loss = loss + kl_coef * kl
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


def _scaled(loss: Tensor, scale: Tensor) -> Tensor:
    """Their product; 0 at a scale of 0, which is the limit where the loss is infinite."""
    return torch.where(scale == 0, 0, loss * scale)


def _given(name: str, value: Tensor | None, option: str) -> Tensor:
    """A tensor that `option` needs."""
    if value is None:
        raise ValueError(f"{name}: expected a tensor with {option}, got None")
    return value


class SFTLoss(Loss):
    """`sft_loss` with its options held by a module; call it on ``(logprob, mask)``.

    Args:
        reduction, label_smoothing, z_loss, scaling, kl_coef: as in `sft_loss`.
    """

    function = staticmethod(sft_loss)

    reduction: Reduction = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    scaling: Scaling = "none"
    kl_coef: float = 0.0
