"""GRPO and its relatives: one table of surrogates and their means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ift.losses._module import Loss
from ift.losses._reduce import divide, mean_over_rows
from ift.losses._tokens import Metrics, Tokens, check_given, record
from ift.losses.preference import not_negative, positive
from ift.losses.ratios import (
    KL_KINDS,
    LARGEST_LOG_RATIO,
    clipped,
    kl_estimate,
    ratio_of,
    record_ratio,
)
from ift_kernels.common import checks

# kind of GRPO: (surrogate, level of its ratio, what the mean is over)
KINDS = {
    "grpo": ("clip", "token", "row_mean"),
    "bnpo": ("clip", "token", "token"),
    "dapo": ("clip", "token", "token"),
    "dr_grpo": ("clip", "token", "fixed"),
    "cispo": ("cispo", "token", "token"),
    "sapo": ("sapo", "token", "row_mean"),
    "gspo": ("clip", "sequence", "row_mean"),
    "luspo": ("clip", "sequence", "row_sum"),
    "vespo": ("vespo", "token", "token"),
}
LEVELS = ("token", "sequence")
SMALLEST_LOG_WEIGHT = math.log(1e-8)  # of VESPO, as published


def _sapo(ratio: Tensor, advantage: Tensor, above: float, below: float) -> Tensor:
    t = torch.where(advantage > 0, above, below).to(ratio)
    return -(4 / t) * torch.sigmoid(t * (ratio - 1)) * advantage


@torch.no_grad()
def _gamma_weight(
    tokens: Tokens,
    log_ratio: Tensor,
    advantage: Tensor,
    importance: Tensor | None,
    shapes: tuple[float, float],
    rates: tuple[float, float],
) -> Tensor:
    """φ of VESPO per token: a Gamma density of its row's weight w, scaled to 1 at w = 1."""

    def bounded(x: Tensor, low: float) -> Tensor:
        return x.clamp(low, LARGEST_LOG_RATIO)

    log_w = tokens.sums(bounded(log_ratio, -LARGEST_LOG_RATIO))
    if importance is not None:
        log_factors = bounded(importance.to(tokens.dtype).log(), SMALLEST_LOG_WEIGHT)
        log_w = log_w + tokens.sums_of("importance", log_factors)
    log_w = tokens.rows.spread(bounded(log_w, SMALLEST_LOG_WEIGHT))
    shape, rate = (torch.where(advantage >= 0, *pair).to(log_w) for pair in (shapes, rates))
    return torch.exp(shape * log_w - rate * torch.expm1(log_w))


def grpo_loss(
    logprob: Tensor,  # (B, T), or (T,) packed
    mask: Tensor,
    advantages: Tensor,  # (rows,) or the shape of logprob
    old_logprob: Tensor | None = None,
    *,
    kind: str = "grpo",
    level: Literal["token", "sequence"] | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    temperatures: tuple[float, float] = (1.0, 1.05),
    gamma_shapes: tuple[float, float] = (2.0, 3.0),
    gamma_rates: tuple[float, float] = (3.0, 2.0),
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    kl_correction: bool = False,
    entropy_coef: float = 0.0,
    max_length: int | None = None,
    reference: Tensor | None = None,
    importance: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | None = None,
    num_rows: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """GRPO (arXiv 2402.03300) and its relatives.

    With ``r = exp(logprob - old_logprob)`` per token, for gspo and luspo (`level` "sequence") the
    exponential of the mean log-ratio over the row, and A the advantage::

        clip   -min(r·A, clip(r, 1 - epsilon, 1 + epsilon_high)·A)
        cispo  -min(r, 1 + epsilon_high).detach() · A · logprob
        sapo   -4/τ · σ(τ(r - 1)) · A,  τ = temperatures[0] if A > 0 else temperatures[1]
        vespo  -φ(w).detach() · A · logprob,  φ(w) = w^k · exp(λ(1 - w)),
               w = exp(Σ log r) over the row (with `importance` in it),
               k, λ = gamma_shapes[0], gamma_rates[0] if A ≥ 0 else the second ones
        loss   mean(surrogate · importance + kl_coef · KL) - entropy_coef · mean(entropy)

    ======== ========= ===================================== ================
    kind     surrogate mean                                  source
    ======== ========= ===================================== ================
    grpo     clip      over rows, of their means             arXiv 2402.03300
    bnpo     clip      over tokens of the batch              TRL
    dapo     clip      over tokens, `num_items` of the step  arXiv 2503.14476
    dr_grpo  clip      sum / (rows · max_length)             arXiv 2503.20783
    cispo    cispo     over tokens                           arXiv 2506.13585
    sapo     sapo      over rows, of their means             arXiv 2511.20347
    gspo     clip, row over rows                             arXiv 2507.18071
    luspo    clip, row over rows, of sums over their tokens  arXiv 2602.05261
    vespo    vespo     over tokens                           arXiv 2602.10693
    ======== ========= ===================================== ================

    Proximal SFT (PSFT, arXiv 2508.17784) is "dapo" with advantages of 1: targets are the sampled
    tokens, and the ratio to the policy before the update is clipped at 1 + epsilon_high.

    Args:
        logprob: log-probabilities of the sampled tokens, (B, T) or packed (T,).
        mask: same shape, bool or 0/1: response tokens.
        advantages: (rows,) or per token; constants. See `group_advantages`.
        old_logprob: of the policy that the update started from, per token, constants; None: this
            one, so r = 1 in value.
        level: of the ratio, TRL's ``importance_sampling_level``: "token", "sequence" (one per row),
            or None, that of the kind. "gspo" is "grpo" with "sequence". Not with "vespo", whose
            weight is the row's anyway.
        epsilon, epsilon_high: clip range, default .2 on both sides; `epsilon_high` None is
            `epsilon`. "cispo" has the upper one only (TRL's `epsilon_high` is then 1 + ours), above
            -1: its bound may lie below 1. "sapo" and "vespo" clip nothing.
        delta: also cut r at `delta` > 1 + epsilon_high where A < 0 (two-sided clipping, the same as
            PPO's dual clip).
        temperatures: of "sapo", for A > 0 and A ≤ 0; above 0.
        gamma_shapes, gamma_rates: k and λ of "vespo", for A ≥ 0 and A < 0; k at least 0, λ above
            0. Defaults as TRL's.
        kl_coef: weight of the KL to `reference`, at least 0; default 0, no reference.
        kl_kind: its estimate, "k1", "k2" or "k3", as `kl_estimate`.
        kl_correction: multiply the estimate by r: unbiased where `old_logprob` sampled.
        entropy_coef: weight of the entropy bonus, its mean over tokens.
        max_length: of "dr_grpo".
        reference: log-probabilities of the reference model, per token.
        importance: weights for samplers other than `old_logprob`, per token or (rows,), constants;
            see `importance_weights`. Of "vespo" factors of w, between 1e-8 and e²⁰.
        entropy: per token, from `ift_kernels.linear_logprobs`.
        cu_seqlens: (rows + 1,): the rows are packed documents.
        num_items: for means over tokens, the entropy's among them: the tokens of the whole
            optimizer step. With an entropy bonus `num_rows` needs it too.
        num_rows: for means over rows: the rows of the whole optimizer step; default those here that
            have tokens.
        metrics: a dict that gets ``ratio``, ``clip_low``, ``clip_high`` and, with `delta`,
            ``clip_delta``, and ``clip_fraction`` of them all (shares of tokens whose gradient is
            clipped away; "cispo" has the last, of those whose ratio is; "sapo" and "vespo" none),
            ``approx_kl`` (k3 of the step),
            ``kl`` and ``perplexity``.

    Returns:
        Scalar.

    Raises:
        TypeError, ValueError: unknown option, missing tensor, a tensor whose option is off, shapes
            that do not match.
    """
    checks.one_of("kind", kind, KINDS)
    surrogate, own_level, over = KINDS[kind]
    if level is not None:
        checks.one_of("level", level, LEVELS)
        if surrogate == "vespo":
            raise ValueError(f"level: expected None with kind 'vespo', got {level!r}")
    checks.one_of("kl_kind", kl_kind, KL_KINDS)
    for name, pair in (
        ("temperatures", temperatures), ("gamma_shapes", gamma_shapes), ("gamma_rates", gamma_rates)
    ):  # fmt: skip
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name}: expected two numbers, for A above and below 0, got {pair!r}")
    high = epsilon if epsilon_high is None else epsilon_high
    for name, value in (("epsilon", epsilon), ("kl_coef", kl_coef), ("entropy_coef", entropy_coef),
                        *(("gamma_shapes", k) for k in gamma_shapes)):  # fmt: skip
        not_negative(name, value)
    if epsilon_high is not None and surrogate in ("sapo", "vespo"):
        raise ValueError(f"epsilon_high: expected None with kind {kind!r}, got {epsilon_high}")
    if surrogate != "cispo":
        not_negative("epsilon_high", high)
    elif not -1 < checks.number("epsilon_high", high) < math.inf:
        raise ValueError(
            f"epsilon_high: expected a finite number above -1 with kind 'cispo', got {high}"
        )
    for name, pair in (("temperatures", temperatures), ("gamma_rates", gamma_rates)):
        for value in pair:
            positive(name, value)
    if delta is not None and not checks.number("delta", delta) > 1 + high:
        raise ValueError(f"delta: expected above 1 + epsilon_high = {1 + high}, got {delta}")
    if delta is not None and surrogate != "clip":
        raise ValueError(f"delta: expected None with kind {kind!r}, got {delta}")
    check_given("reference", reference, "kl_coef", kl_coef > 0)
    tokens = Tokens(logprob, mask, cu_seqlens)
    advantage = tokens.each("advantages", advantages).detach()
    old = tokens.logprob if old_logprob is None else tokens.like("old_logprob", old_logprob)
    log_ratio = tokens.logprob - old.detach()
    constants = None if importance is None else tokens.each("importance", importance).detach()
    if surrogate == "vespo":
        weight = _gamma_weight(tokens, log_ratio, advantage, importance, gamma_shapes, gamma_rates)
    if (level or own_level) == "sequence":
        log_ratio = tokens.rows.spread(tokens.means(log_ratio))
    ratio = ratio_of(log_ratio)
    if surrogate == "clip":
        loss = clipped(ratio, advantage, epsilon, high, delta)
    elif surrogate == "cispo":
        loss = -ratio.detach().clamp(max=1 + high) * advantage * tokens.logprob
    elif surrogate == "vespo":
        loss = -weight * advantage * tokens.logprob
    else:
        loss = _sapo(ratio, advantage, *temperatures)
    if constants is not None and surrogate != "vespo":
        loss = loss * constants
    if kl_coef:
        if reference is None:
            raise ValueError("reference: expected log-probabilities with kl_coef, got None")
        penalty = kl_estimate(tokens.logprob, tokens.like("reference", reference), kl_kind)
        record(metrics, kl=tokens.mean(penalty))
        loss = loss + kl_coef * (penalty * ratio if kl_correction else penalty)
    record_ratio(metrics, tokens, log_ratio, advantage, epsilon, high, surrogate, delta)
    bonus = entropy_bonus(tokens, entropy, entropy_coef, num_items, num_rows)
    if entropy_coef and over != "token":
        num_items = None  # the bonus alone is a mean over tokens
    return average(tokens, loss, over, num_items, num_rows, max_length) - bonus


def average(
    tokens: Tokens,
    loss: Tensor,
    over: str,
    num_items: float | Tensor | None,
    num_rows: float | Tensor | None,
    max_length: int | None,
) -> Tensor:
    """The mean of a per-token loss: over "token"s, rows ("row_mean", "row_sum"), or "fixed"."""
    for name, value, users in (
        ("num_items", num_items, ("token",)),
        ("num_rows", num_rows, ("row_mean", "row_sum", "fixed")),
    ):
        if value is not None and over not in users:
            raise ValueError(f"{name}: expected None with a mean over {over!r}, got {value}")
    if over == "token":
        total = tokens.sums(loss).sum()
        return divide(total, "num_items", tokens.total if num_items is None else num_items)
    if over == "row_mean":
        return mean_over_rows(tokens.means(loss), tokens.counts, num_rows)
    if over == "row_sum":
        return mean_over_rows(tokens.sums(loss), tokens.counts, num_rows)
    if max_length is None or max_length < 1:
        raise ValueError(f"max_length: expected a length of at least 1, got {max_length}")
    return mean_over_rows(tokens.sums(loss) / max_length, tokens.counts, num_rows)


def entropy_bonus(
    tokens: Tokens,
    entropy: Tensor | None,
    entropy_coef: float,
    num_items: float | Tensor | None,
    num_rows: float | Tensor | None,
) -> Tensor | float:
    """``entropy_coef`` times the mean entropy over tokens (of the whole step)."""
    check_given("entropy", entropy, "entropy_coef", entropy_coef > 0, needed=True)
    if entropy is None:
        return 0.0
    if num_rows is not None and num_items is None:
        raise ValueError("num_items: expected with num_rows and entropy_coef, got None")
    total = tokens.like("entropy", entropy).sum()
    count = tokens.total if num_items is None else num_items
    return entropy_coef * divide(total, "num_items", count)


class GRPOLoss(Loss):
    """`grpo_loss`, options held by a module; call it on ``(logprob, mask, advantages, old)``."""

    function = staticmethod(grpo_loss)
    needs = 1

    kind: str = "grpo"
    level: Literal["token", "sequence"] | None = None
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    temperatures: tuple[float, float] = (1.0, 1.05)
    gamma_shapes: tuple[float, float] = (2.0, 3.0)
    gamma_rates: tuple[float, float] = (3.0, 2.0)
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    kl_correction: bool = False
    entropy_coef: float = 0.0
    max_length: int | None = None
