"""PPO: the clipped surrogate with a critic and an entropy bonus."""

from __future__ import annotations

import torch
from torch import Tensor

from ift.losses._module import Loss
from ift.losses._reduce import divide
from ift.losses._tokens import Metrics, Tokens, check_given, record
from ift.losses.policy import grpo_loss
from ift.losses.preference import not_negative


def ppo_loss(
    logprob: Tensor,  # (B, T), or (T,) packed
    mask: Tensor,
    advantages: Tensor,  # the shape of logprob, or (rows,)
    old_logprob: Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    value_coef: float = 0.5,
    value_clip: float | None = 0.2,
    entropy_coef: float = 0.0,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """PPO (arXiv 1707.06347): clipped surrogate, value loss and entropy bonus, means over tokens.

    ``mean(-min(r·A, clip(r)·A)) + value_coef · value_loss - entropy_coef · mean(entropy)``; with
    `dual_clip` c (arXiv 1912.09729) the surrogate of A < 0 is at least ``c·A``.

    Args:
        epsilon, epsilon_high: clip range, default .2 on both sides.
        dual_clip: c, above 1 + epsilon_high; None leaves it out.
        value_coef, value_clip, values, old_values, returns: as `value_loss`; without `values` there
            is no such term.
        entropy_coef, entropy: as `grpo_loss`.
        num_items: tokens of the whole optimizer step, of all three means.
        The rest: as `grpo_loss`, of which the policy term is ``kind="dapo"``.
    """
    loss = grpo_loss(
        logprob, mask, advantages, old_logprob, kind="dapo", epsilon=epsilon,
        epsilon_high=epsilon_high, delta=dual_clip, entropy_coef=entropy_coef, entropy=entropy,
        cu_seqlens=cu_seqlens, num_items=num_items, metrics=metrics,
    )  # fmt: skip
    not_negative("value_coef", value_coef)
    check_given("returns", returns, "values", values is not None, needed=True)
    check_given("old_values", old_values, "values", values is not None)
    if values is None or returns is None:
        return loss
    critic = value_loss(
        values, mask, returns, old_values, clip=value_clip, num_items=num_items, metrics=metrics
    )
    return loss + value_coef * critic


def value_loss(
    values: Tensor,  # (B, T) or (T,)
    mask: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    num_items: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """Squared error of a critic, half of its mean over tokens.

    ``½ max((V - R)², (clip(V, V_old - clip, V_old + clip) - R)²)``; without `old_values` or `clip`
    ``½ (V - R)²``.

    Args:
        values: predictions, with gradient.
        mask: response tokens.
        returns: targets, constants.
        old_values: predictions before the update, constants; None without `clip`.
        clip: at least 0, default .2.
        num_items: tokens of the whole optimizer step.
        metrics: a dict that gets ``value_loss`` and ``value_clip_fraction``.
    """
    check_given("old_values", old_values, "clip", clip is not None)
    tokens = Tokens(values, mask)  # not log-probabilities, but masked and widened alike
    target = tokens.like("returns", returns).detach()
    error = (tokens.logprob - target).square()
    share = torch.zeros_like(error)
    if old_values is not None and clip is not None:
        not_negative("clip", clip)
        old = tokens.like("old_values", old_values).detach()
        kept = (torch.clamp(tokens.logprob, old - clip, old + clip) - target).square()
        share = (kept > error).to(error.dtype)
        error = torch.max(error, kept)
    total = error.sum() / 2
    loss = divide(total, "num_items", tokens.total if num_items is None else num_items)
    record(metrics, value_loss=loss, value_clip_fraction=tokens.mean(share))
    return loss


class PPOLoss(Loss):
    """`ppo_loss`, options held by a module; call it on ``(logprob, mask, advantages, old)``."""

    function = staticmethod(ppo_loss)
    needs = 1

    epsilon: float = 0.2
    epsilon_high: float | None = None
    dual_clip: float | None = None
    value_coef: float = 0.5
    value_clip: float | None = 0.2
    entropy_coef: float = 0.0
