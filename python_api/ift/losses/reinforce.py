"""REINFORCE and RLOO: policy gradients of whole responses."""

from __future__ import annotations

import torch
from torch import Tensor

from ift.losses._module import Loss
from ift.losses._reduce import mean_over_rows
from ift.losses._tokens import Metrics, Tokens, record_tokens
from ift.losses.advantages import rloo_advantages
from ift.losses.policy import average, entropy_bonus
from ift.losses.preference import not_negative
from ift.losses.ratios import clipped, ratio_of, record_ratio


def reinforce_loss(
    logprob: Tensor,  # (B, T), or (T,) packed
    mask: Tensor,
    advantages: Tensor,  # (rows,) or the shape of logprob
    *,
    entropy_coef: float = 0.0,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | None = None,
    num_rows: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """REINFORCE: ``-mean over rows of Σ_t A_t · logprob_t``, less an entropy bonus.

    Args: as `grpo_loss`.
    """
    not_negative("entropy_coef", entropy_coef)
    tokens = Tokens(logprob, mask, cu_seqlens)
    advantage = tokens.each("advantages", advantages).detach()
    record_tokens(metrics, tokens)
    loss = average(tokens, -advantage * tokens.logprob, "row_sum", None, num_rows, None)
    if num_items is not None and not entropy_coef:
        raise ValueError(f"num_items: expected None without entropy_coef, got {num_items}")
    return loss - entropy_bonus(tokens, entropy, entropy_coef, num_items, num_rows)


def rloo_loss(
    logprob: Tensor,  # (B, T), or (T,) packed
    mask: Tensor,
    rewards: Tensor,  # (rows,)
    old_logprob: Tensor | None = None,
    *,
    group_size: int = 2,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    cu_seqlens: Tensor | None = None,
    num_rows: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """REINFORCE Leave-One-Out (arXiv 2402.14740), with the ratio of whole sequences clipped.

    ``-mean over rows of min(r·A, clip(r)·A)``, ``r = exp(Σ_t logprob - Σ_t old_logprob)``, A of
    `rloo_advantages`. At r = 1 its gradient is that of REINFORCE.

    Args:
        rewards: (rows,), the `group_size` responses to one prompt one after another.
        old_logprob: per token, or sums (rows,).
        group_size: at least 2 for a gradient.
        The rest: as `grpo_loss`.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    not_negative("epsilon", epsilon)
    not_negative("epsilon_high", high)
    tokens = Tokens(logprob, mask, cu_seqlens)
    total = tokens.sums(tokens.logprob)
    old = total if old_logprob is None else tokens.sums_of("old_logprob", old_logprob)
    log_ratio = total - old.detach()
    advantage = rloo_advantages(rewards, group_size).to(log_ratio)
    if advantage.shape != total.shape:
        raise ValueError(f"rewards: expected shape ({total.shape[0]},), got {tuple(rewards.shape)}")
    loss = clipped(ratio_of(log_ratio), advantage, epsilon, high, None)
    spread = tokens.rows.spread
    record_ratio(metrics, tokens, spread(log_ratio), spread(advantage), epsilon, high, "clip")
    return mean_over_rows(torch.where(tokens.counts > 0, loss, 0), tokens.counts, num_rows)


class REINFORCELoss(Loss):
    """`reinforce_loss`, options held by a module; call it on ``(logprob, mask, advantages)``."""

    function = staticmethod(reinforce_loss)
    needs = 1

    entropy_coef: float = 0.0


class RLOOLoss(Loss):
    """`rloo_loss`, options held by a module; call it on ``(logprob, mask, rewards, old)``."""

    function = staticmethod(rloo_loss)
    needs = 1

    group_size: int = 2
    epsilon: float = 0.2
    epsilon_high: float | None = None
