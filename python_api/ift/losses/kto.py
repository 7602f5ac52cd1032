"""Kahneman-Tversky Optimization: single responses that are desirable or not."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ift.losses._module import Loss
from ift.losses._reduce import mean_over_rows
from ift.losses._tokens import Metrics, Tokens, record, record_tokens
from ift.losses.preference import not_negative, positive
from ift_kernels.common import checks


def kto_loss(
    logprob: Tensor,  # (B, T), or (T,) packed
    mask: Tensor,
    desirable: Tensor,  # (rows,)
    reference: Tensor | None = None,
    *,
    beta: float = 0.1,
    kind: Literal["kto", "apo_zero"] = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    length_normalized: bool = False,
    kl: Tensor | float = 0.0,
    cu_seqlens: Tensor | None = None,
    num_rows: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    metrics: Metrics | None = None,
) -> Tensor:
    """Kahneman-Tversky Optimization (arXiv 2402.01306).

    With u the log-ratio ``log π - log π_ref`` of a response, summed over its tokens::

        desirable    desirable_weight   * (1 - σ(beta * (u - kl)))
        undesirable  undesirable_weight * (1 - σ(beta * (kl - u)))

    Args:
        logprob: log-probabilities of the targets, shifted, (B, T) or packed (T,).
        mask: same shape, bool or 0/1: response tokens.
        desirable: (rows,) bool or 0/1.
        reference: of the frozen reference model, shaped like `logprob`, or sums (rows,); None is 0.
        beta: above 0, default 0.1.
        kind: "kto", or "apo_zero", the same without `kl`.
        desirable_weight, undesirable_weight: at least 0, to balance the two.
        length_normalized: u over the number of tokens, as Liger's ``average_log_prob``; `kto_kl`
            has the same option for `kl`.
        kl: the reference point z₀, from `kto_kl` on prompts with other prompts' responses; a
            constant of at least 0. "apo_zero" has none.
        cu_seqlens: (rows + 1,): the rows are packed documents.
        num_rows: divide by this instead of by the rows with tokens: those of the whole optimizer
            step.
        reduction: "mean" over rows, or "none".
        metrics: a dict that gets rewards of both kinds (βu, means over those present), ``kl``.

    Returns:
        Scalar, or (rows,). Rows without tokens are 0 and do not count.

    Raises:
        TypeError, ValueError: shapes that do not match, options out of range.
    """
    checks.one_of("kind", kind, ("kto", "apo_zero"))
    checks.one_of("reduction", reduction, ("mean", "none"))
    positive("beta", beta)
    not_negative("desirable_weight", desirable_weight)
    not_negative("undesirable_weight", undesirable_weight)
    if kind == "apo_zero" and (isinstance(kl, Tensor) or kl):
        raise ValueError(f"kl: expected 0 with kind 'apo_zero', which has no such point, got {kl}")
    tokens = Tokens(logprob, mask, cu_seqlens)
    if not isinstance(desirable, Tensor) or desirable.shape != (tokens.rows.count,):
        got = tuple(desirable.shape) if isinstance(desirable, Tensor) else type(desirable).__name__
        raise ValueError(f"desirable: expected shape ({tokens.rows.count},), got {got}")
    is_desirable = desirable != 0
    ratio = _log_ratios(tokens, reference, length_normalized)
    point = torch.as_tensor(kl, device=ratio.device).to(ratio).detach()
    if point.numel() != 1:
        raise ValueError(f"kl: expected one number, got shape {tuple(point.shape)}")
    sign = torch.where(is_desirable, 1.0, -1.0).to(ratio)
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight).to(ratio)
    loss = weight * torch.sigmoid(-beta * sign * (ratio - point))
    loss = torch.where(tokens.counts > 0, loss, 0)
    if metrics is not None:
        for name, rows in (("chosen", is_desirable), ("rejected", ~is_desirable)):
            rows = rows & (tokens.counts > 0)
            total = torch.where(rows, beta * ratio.detach(), 0).sum()
            record(metrics, **{f"reward_{name}": total / rows.sum().clamp(min=1)})
        margin = metrics["reward_chosen"] - metrics["reward_rejected"]
        record(metrics, reward_margin=margin, kl=point.reshape(()))
        record_tokens(metrics, tokens)
    if reduction == "none":
        if num_rows is not None:
            raise ValueError("num_rows: expected None with reduction 'none', got a number")
        return loss
    return mean_over_rows(loss, tokens.counts, num_rows)


@torch.no_grad()
def kto_kl(
    logprob: Tensor, mask: Tensor, reference: Tensor, *, length_normalized: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The reference point z₀ of KTO: ``mean(log π - log π_ref).clamp(min=0)``, a constant.

    Args:
        logprob, mask: of responses that belong to *other* prompts of the batch.
        reference: of the reference model, shaped like `logprob`, or sums (rows,).
        length_normalized, cu_seqlens: as `kto_loss`.

    Returns:
        Scalar, the mean over rows that have tokens.
    """
    tokens = Tokens(logprob, mask, cu_seqlens)
    ratio = _log_ratios(tokens, reference, length_normalized)
    ratio = torch.where(tokens.counts > 0, ratio, 0)
    return mean_over_rows(ratio, tokens.counts, None).clamp(min=0)


def _log_ratios(tokens: Tokens, reference: Tensor | None, length_normalized: bool) -> Tensor:
    """u of each row, (rows,)."""
    ratio = tokens.sums(tokens.logprob)
    if reference is not None:
        ratio = ratio - tokens.sums_of("reference", reference).detach()
    return ratio / tokens.counts.clamp(min=1) if length_normalized else ratio


class KTOLoss(Loss):
    """`kto_loss`, options held by a module; call it on ``(logprob, mask, desirable, reference)``.

    `kl` is given with each call.
    """

    function = staticmethod(kto_loss)
    needs = 1

    beta: float = 0.1
    kind: Literal["kto", "apo_zero"] = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    length_normalized: bool = False
    reduction: Literal["mean", "none"] = "mean"
