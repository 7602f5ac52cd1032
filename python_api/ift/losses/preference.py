"""Losses on pairs of a chosen and a rejected response, without a reference: SimPO, CPO, ORPO, SLiC.

The rows of a batch are the chosen responses, then the rejected ones in the same order.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ift.losses._module import Loss
from ift.losses._reduce import divide
from ift.losses._tokens import Metrics, Pairs, Tokens, record, record_tokens
from ift_kernels.common import checks

NLL = ("row", "token")


class PairTokens(Tokens):
    """The tokens of a batch of pairs.

    A pair of which neither response has a token does not count in a mean.
    """

    def __init__(self, logprob: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> None:
        super().__init__(logprob, mask, cu_seqlens)
        self.lengths = self.halves(self.counts)

    def halves(self, values: Tensor) -> Pairs:
        """Values of the rows, (rows,), of the chosen and the rejected ones."""
        return Pairs.halves(values)

    @property
    def counted(self) -> Tensor:
        """Which pairs count, (pairs,) bool."""
        return self.lengths.chosen + self.lengths.rejected > 0

    def pair_sums(self, x: Tensor) -> Pairs:
        """Sums over each response of a per-token tensor."""
        return self.halves(self.sums(x))

    def pair_means(self, x: Tensor) -> Pairs:
        """Means over each response; 0 for an empty one."""
        return self.halves(self.means(x))

    def reduce(self, per_pair: Tensor, reduction: str, num_pairs: float | Tensor | None) -> Tensor:
        """Mean over the pairs that count, or over `num_pairs`; or each pair's loss."""
        per_pair = torch.where(self.counted, per_pair, 0)
        if reduction == "none":
            if num_pairs is not None:
                raise ValueError("num_pairs: expected None with reduction 'none', got a number")
            return per_pair
        count = self.counted.sum() if num_pairs is None else num_pairs
        return divide(per_pair.sum(), "num_pairs", count)

    def chosen_nll(
        self,
        weight: float,
        average: str,
        num_items: float | Tensor | None,
        num_pairs: float | Tensor | None,
    ) -> Tensor | float:
        """`weight` times the negative log-likelihood of the chosen responses per pair, (pairs,).

        "row": its mean per token. "token": scaled so that `reduce` gives the mean over tokens.
        """
        not_negative("nll_weight", weight)
        checks.one_of("nll", average, NLL)
        if not weight:
            if num_items is not None:
                raise ValueError(f"num_items: expected None without nll_weight, got {num_items}")
            return 0.0
        if average == "row":
            if num_items is not None:
                raise ValueError("num_items: expected None with nll 'row', got a number")
            return -weight * self.pair_means(self.logprob).chosen
        if (num_items is None) != (num_pairs is None):
            raise ValueError("num_items: expected together with num_pairs (nll 'token'), got one")
        count = self.lengths.chosen.sum() if num_items is None else num_items
        pairs = self.counted.sum() if num_pairs is None else num_pairs
        return -weight * divide(self.pair_sums(self.logprob).chosen * pairs, "num_items", count)


def check_pairs(beta: float, label_smoothing: float, reduction: str, most: float = 0.5) -> None:
    """Raise for a `beta` that is not positive, or a smoothing or reduction that does not exist."""
    positive("beta", beta)
    if not 0 <= checks.number("label_smoothing", label_smoothing) <= most:
        raise ValueError(f"label_smoothing: expected in [0, {most}], got {label_smoothing}")
    checks.one_of("reduction", reduction, ("mean", "none"))


def positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above 0."""
    if not 0 < checks.number(name, value) < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def not_negative(name: str, value: float) -> None:
    """Raise unless `value` is a finite number of at least 0."""
    if not 0 <= checks.number(name, value) < math.inf:
        raise ValueError(f"{name}: expected a finite number ≥ 0, got {value}")


def logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """Negative log-likelihood that the chosen is preferred, labels wrong with that probability."""
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def record_rewards(metrics: Metrics | None, tokens: PairTokens, rewards: Pairs) -> None:
    """Rewards, their margin and how often it is right; log-probabilities of the responses."""
    if metrics is None:
        return
    count = tokens.counted.sum().clamp(min=1)
    logprob = tokens.pair_sums(tokens.logprob.detach())
    named = {
        "reward_chosen": rewards.chosen,
        "reward_rejected": rewards.rejected,
        "reward_margin": rewards.chosen - rewards.rejected,
        "reward_accuracy": (rewards.chosen > rewards.rejected).to(tokens.dtype),
        "logprob_chosen": logprob.chosen,
        "logprob_rejected": logprob.rejected,
    }
    means = {k: torch.where(tokens.counted, v, 0).sum() / count for k, v in named.items()}
    record(metrics, pairs=tokens.counted.sum(), **means)
    record_tokens(metrics, tokens)


def cpo_loss(
    logprob: Tensor,  # (2 · pairs, T), or (T,) packed
    mask: Tensor,
    *,
    beta: float = 0.1,
    kind: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid",
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    nll_weight: float = 1.0,
    nll: Literal["row", "token"] = "token",
    cu_seqlens: Tensor | None = None,
    num_pairs: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    metrics: Metrics | None = None,
) -> Tensor:
    """Contrastive Preference Optimization (arXiv 2401.08417), and its mix with SimPO.

    With lp⁺, lp⁻ the summed log-probabilities of the responses, ā, b̄ their means per token::

        h = beta * (lp⁺ - lp⁻)                     # length_normalized: beta * (ā - b̄)
                                                   # simpo: beta * (ā - b̄) - gamma
        sigmoid, simpo  -(1 - ε) * logsigmoid(h) - ε * logsigmoid(-h)
        hinge           relu(1 - h)
        ipo             (h / beta - 1 / (2 * beta)) ** 2
        loss            that + nll_weight * negative log-likelihood of the chosen

    Args:
        logprob: log-probabilities of the targets, shifted; the chosen rows, then the rejected.
        mask: same shape, bool or 0/1: response tokens.
        beta: temperature, above 0, default 0.1.
        kind: above. "simpo" with ``nll_weight > 0`` is CPO-SimPO.
        gamma: target margin of "simpo", default 0.5.
        label_smoothing: ε, in [0, 0.5].
        length_normalized: means per token in place of sums, as Liger's ``average_log_prob``; those
            of "simpo" always are.
        nll_weight: default 1, as published; 0 leaves the term out.
        nll: mean of that term over "token"s of the batch, as the released code, or over "row"s of
            their means.
        cu_seqlens: (2 · pairs + 1,): the rows are packed documents.
        num_pairs: divide by this instead of by the pairs here: those of the whole optimizer step.
        num_items: the chosen tokens of the whole optimizer step, with `num_pairs` and
            ``nll="token"``.
        reduction: "mean" over pairs, or "none".
        metrics: a dict that gets rewards, their margin and accuracy, log-probabilities, perplexity.

    Returns:
        Scalar, or (pairs,). Pairs without any token are 0 and do not count.

    Raises:
        TypeError, ValueError: unknown option, shapes that do not match, an odd number of rows.
    """
    checks.one_of("kind", kind, ("sigmoid", "hinge", "ipo", "simpo"))
    check_pairs(beta, label_smoothing, reduction)
    if label_smoothing and kind in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing: expected 0 with kind {kind!r}, got {label_smoothing}")
    tokens = PairTokens(logprob, mask, cu_seqlens)
    over_rows = tokens.pair_means if length_normalized or kind == "simpo" else tokens.pair_sums
    rewards = Pairs(*(beta * score for score in over_rows(tokens.logprob)))
    h = rewards.chosen - rewards.rejected
    if kind == "hinge":
        loss = F.relu(1 - h)
    elif kind == "ipo":
        loss = (h / beta - 1 / (2 * beta)).square()
    else:
        loss = logistic(h - gamma if kind == "simpo" else h, label_smoothing)
    loss = loss + tokens.chosen_nll(nll_weight, nll, num_items, num_pairs)
    record_rewards(metrics, tokens, rewards)
    return tokens.reduce(loss, reduction, num_pairs)


def simpo_loss(
    logprob: Tensor,
    mask: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    cu_seqlens: Tensor | None = None,
    num_pairs: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    metrics: Metrics | None = None,
) -> Tensor:
    """SimPO (arXiv 2405.14734): ``-logsigmoid(beta * (ā - b̄) - gamma)`` on means per token.

    Args:
        beta: default 2, the paper's smallest.
        gamma: target margin, default 1.
        The rest: as `cpo_loss`, of which it is ``kind="simpo"`` without the likelihood term.
    """
    return cpo_loss(
        logprob, mask, beta=beta, kind="simpo", gamma=gamma, label_smoothing=label_smoothing,
        nll_weight=0.0, cu_seqlens=cu_seqlens, num_pairs=num_pairs, reduction=reduction,
        metrics=metrics,
    )  # fmt: skip


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x ≤ 0 without cancellation (Mächler 2012).

    Above −eps of its dtype, where a probability is indistinguishable from 1, it is that of −eps,
    without gradient: the exact value would be −∞.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    is_small = x > -math.log(2)
    # Both branches get safe arguments: else the gradient of the one not taken would be NaN.
    small = torch.log(-torch.expm1(torch.where(is_small, x, -1.0)))
    return torch.where(is_small, small, torch.log1p(-torch.exp(torch.where(is_small, -1.0, x))))


def orpo_loss(
    logprob: Tensor,  # (2 · pairs, T), or (T,) packed
    mask: Tensor,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    nll: Literal["row", "token"] = "row",
    cu_seqlens: Tensor | None = None,
    num_pairs: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    metrics: Metrics | None = None,
) -> Tensor:
    """Odds Ratio Preference Optimization (arXiv 2403.07691).

    With ā, b̄ the mean log-probabilities per token of the chosen and the rejected response::

        log_odds = (ā - b̄) - (log(1 - exp(ā)) - log(1 - exp(b̄)))
        loss = nll_weight * -ā - beta * logsigmoid(log_odds)

    Args:
        beta: weight of the odds ratio, default 0.1.
        nll_weight: of the likelihood of the chosen, default 1.
        nll: its mean over "row"s, as the paper, or over the chosen "token"s of the batch.
        The rest: as `cpo_loss`.
    """
    check_pairs(beta, 0.0, reduction)
    tokens = PairTokens(logprob, mask, cu_seqlens)
    mean = tokens.pair_means(tokens.logprob)
    log_odds = (mean.chosen - mean.rejected) - (log1mexp(mean.chosen) - log1mexp(mean.rejected))
    loss = -beta * F.logsigmoid(log_odds)
    loss = loss + tokens.chosen_nll(nll_weight, nll, num_items, num_pairs)
    record_rewards(metrics, tokens, Pairs(beta * mean.chosen, beta * mean.rejected))
    if metrics is not None:
        counted = torch.where(tokens.counted, log_odds, 0)
        record(metrics, log_odds=counted.sum() / tokens.counted.sum().clamp(min=1))
    return tokens.reduce(loss, reduction, num_pairs)


def slic_loss(
    logprob: Tensor,  # (2 · pairs, T), or (T,) packed
    mask: Tensor,
    *,
    delta: float = 1.0,
    beta: float = 1.0,
    nll_weight: float = 0.0,
    nll: Literal["row", "token"] = "row",
    length_normalized: bool = False,
    cu_seqlens: Tensor | None = None,
    num_pairs: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    metrics: Metrics | None = None,
) -> Tensor:
    """Sequence Likelihood Calibration (SLiC-HF, arXiv 2305.10425).

    ``relu(delta - beta * (lp⁺ - lp⁻)) + nll_weight * negative log-likelihood of the chosen``.

    Args:
        delta: margin, at least 0, default 1.
        beta: scale of the log-probabilities, default 1.
        nll_weight: the paper's regularisation λ on a target; default 0.
        length_normalized: means per token in place of sums.
        The rest: as `cpo_loss`.
    """
    check_pairs(beta, 0.0, reduction)
    not_negative("delta", delta)
    tokens = PairTokens(logprob, mask, cu_seqlens)
    scores = (tokens.pair_means if length_normalized else tokens.pair_sums)(tokens.logprob)
    rewards = Pairs(beta * scores.chosen, beta * scores.rejected)
    loss = F.relu(delta - (rewards.chosen - rewards.rejected))
    loss = loss + tokens.chosen_nll(nll_weight, nll, num_items, num_pairs)
    record_rewards(metrics, tokens, rewards)
    return tokens.reduce(loss, reduction, num_pairs)


class CPOLoss(Loss):
    """`cpo_loss` with its options held by a module; call it on ``(logprob, mask)``."""

    function = staticmethod(cpo_loss)
    pairs = True

    beta: float = 0.1
    kind: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    gamma: float = 0.5
    label_smoothing: float = 0.0
    length_normalized: bool = False
    nll_weight: float = 1.0
    nll: Literal["row", "token"] = "token"
    reduction: Literal["mean", "none"] = "mean"


class SimPOLoss(Loss):
    """`simpo_loss` with its options held by a module; call it on ``(logprob, mask)``."""

    function = staticmethod(simpo_loss)
    pairs = True

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0
    reduction: Literal["mean", "none"] = "mean"


class ORPOLoss(Loss):
    """`orpo_loss` with its options held by a module; call it on ``(logprob, mask)``."""

    function = staticmethod(orpo_loss)
    pairs = True

    beta: float = 0.1
    nll_weight: float = 1.0
    nll: Literal["row", "token"] = "row"
    reduction: Literal["mean", "none"] = "mean"


class SLiCLoss(Loss):
    """`slic_loss` with its options held by a module; call it on ``(logprob, mask)``."""

    function = staticmethod(slic_loss)
    pairs = True

    delta: float = 1.0
    beta: float = 1.0
    nll_weight: float = 0.0
    nll: Literal["row", "token"] = "row"
    length_normalized: bool = False
    reduction: Literal["mean", "none"] = "mean"
