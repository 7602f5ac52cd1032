"""Ratios of probabilities under two policies: clipped, capped, and as estimates of the KL."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ift.losses._tokens import Metrics, Tokens, record, record_tokens
from ift.losses.preference import positive
from ift_kernels.common import checks

KL_KINDS = ("k1", "k2", "k3")
LARGEST_LOG_RATIO = 20.0


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp, at most e²⁰ in value; its derivative is that value, also above e²⁰.

    A ratio of e¹⁰⁰⁰⁰ gives finite losses, and gradients in the right direction.
    """
    stopped = log_ratio.detach().clamp(max=LARGEST_LOG_RATIO)
    return torch.exp(stopped + (log_ratio - log_ratio.detach()))


def kl_estimate(logprob: Tensor, reference: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from tokens sampled from π (Schulman 2020).

    With ``d = logprob - reference``: k1 ``d``, k2 ``d² / 2``, k3 ``e⁻ᵈ - 1 + d``. k1 and k3 are
    unbiased, k2 and k3 never negative. As a loss, the gradient of k1 has mean 0: it constrains
    nothing; that of k2 is the gradient of the KL.

    Args:
        logprob, reference: any shape; `reference` gets no gradient.
        kind: "k1", "k2" or "k3".
    """
    checks.one_of("kind", kind, KL_KINDS)
    d = logprob - reference.detach()
    if kind == "k1":
        return d
    return d.square() / 2 if kind == "k2" else ratio_of(-d) - 1 + d


def clipped(
    ratio: Tensor, advantage: Tensor, low: float, high: float, most: float | None
) -> Tensor:
    """-min(r·A, clip(r, 1 - low, 1 + high)·A), with r itself at most `most`.

    Its gradient is active for A > 0 iff r < 1 + high, for A < 0 iff 1 - low < r (< `most`).
    """
    inside = ratio.clamp(1 - low, 1 + high)
    free = ratio if most is None else ratio.clamp(max=most)
    return -torch.min(free * advantage, inside * advantage)


@torch.no_grad()
def importance_weights(
    logprob: Tensor, sampler_logprob: Tensor, mask: Tensor, *, cap: float = 2.0,
    level: Literal["token", "sequence"] = "token", cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Truncated importance weights ``min(π_old / π_sampler, cap)``, constants.

    For samples of an engine whose probabilities differ from the trainer's.

    Args:
        logprob: the trainer's log-probabilities before the update (`old_logprob`).
        sampler_logprob: those that the sampler reported.
        mask: response tokens.
        cap: default 2.
        level: ratios of "token"s, or one per row of summed log-probabilities, "sequence".
        cu_seqlens: the rows are packed documents.

    Returns:
        The shape of `logprob`, or (rows,).
    """
    positive("cap", cap)
    checks.one_of("level", level, ("token", "sequence"))
    tokens = Tokens(logprob, mask, cu_seqlens)
    log_ratio = tokens.logprob - tokens.like("sampler_logprob", sampler_logprob)
    return ratio_of(tokens.sums(log_ratio) if level == "sequence" else log_ratio).clamp(max=cap)


def record_ratio(
    metrics: Metrics | None,
    tokens: Tokens,
    log_ratio: Tensor,
    advantage: Tensor,
    low: float,
    high: float,
    surrogate: str,
    most: float | None = None,
) -> None:
    """Metrics of the ratio, and shares of clipped tokens; options of `clipped`."""
    if metrics is None:
        return
    log_ratio = log_ratio.detach()
    ratio = ratio_of(log_ratio)
    found = {
        "ratio": ratio,
        # Of the tokens under the old policy: KL(π_old ‖ π).
        "approx_kl": ratio - 1 - log_ratio,
    }
    if surrogate == "clip":
        below, above = (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)
        found |= {"clip_low": below, "clip_high": above, "clip_fraction": below | above}
        if most is not None:
            capped = (ratio > most) & (advantage < 0)
            found |= {"clip_delta": capped, "clip_fraction": below | above | capped}
    elif surrogate == "cispo":
        found["clip_fraction"] = ratio > 1 + high
    record(metrics, **{k: tokens.mean(v.to(tokens.dtype)) for k, v in found.items()})
    record_tokens(metrics, tokens)
