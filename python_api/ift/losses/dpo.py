"""Direct Preference Optimization and its relatives: one table of formulas on the log-ratios.

The rows of a batch are the chosen responses, then the rejected ones in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ift.losses._module import Loss
from ift.losses._tokens import Metrics, Pairs
from ift.losses.preference import (
    PairTokens,
    check_pairs,
    logistic,
    positive,
    record_rewards,
)
from ift_kernels.common import checks

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# e⁸⁰ and its square root's square are finite in float32; a score beyond has no gradient.
LARGEST_EXPONENT = 40.0


class Ratios(NamedTuple):
    """Arguments of the formulas; (pairs,) each."""

    chosen: Tensor  # log π(y⁺) − log π_ref(y⁺)
    rejected: Tensor  # log π(y⁻) − log π_ref(y⁻)
    h: Tensor  # beta · (score of chosen − score of rejected); scores are the ratios for reverse KL
    beta: float
    smoothing: float
    tau: float  # of discopop


def _exo(r: Ratios) -> Tensor:
    log_p, log_q = F.logsigmoid(r.h), F.logsigmoid(-r.h)
    log_target = math.log1p(-r.smoothing), math.log(r.smoothing)
    return log_p.exp() * (log_p - log_target[0]) + log_q.exp() * (log_q - log_target[1])


def _discopop(r: Ratios) -> Tensor:
    mix = F.logsigmoid(r.h / r.tau)
    # exp(-h) · σ(h/τ) as one exponential: the first factor alone would overflow.
    return -F.logsigmoid(r.h) * F.logsigmoid(-r.h / r.tau).exp() + (mix - r.h).exp()


def _sppo(r: Ratios) -> Tensor:
    return (r.chosen - 0.5 / r.beta).square() + (r.rejected + 0.5 / r.beta).square()


def _nca(r: Ratios) -> Tensor:
    a, b = r.beta * r.chosen, r.beta * r.rejected
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


def _robust(r: Ratios) -> Tensor:
    right, wrong = -F.logsigmoid(r.h), -F.logsigmoid(-r.h)
    return ((1 - r.smoothing) * right - r.smoothing * wrong) / (1 - 2 * r.smoothing)


FORMULAS: dict[str, Callable[[Ratios], Tensor]] = {
    "sigmoid": lambda r: logistic(r.h, r.smoothing),
    "robust": _robust,
    "hinge": lambda r: F.relu(1 - r.h),
    "ipo": lambda r: (r.h / r.beta - 1 / (2 * r.beta)).square(),
    "exo": _exo,
    "nca": _nca,
    "bco": lambda r: -F.logsigmoid(r.beta * r.chosen) - F.logsigmoid(-r.beta * r.rejected),
    "sppo": _sppo,
    "aot": lambda r: logistic(r.h, r.smoothing),  # of margins paired anew, see `_sorted`
    "aot_unpaired": lambda r: logistic(r.h, r.smoothing),
    "apo_zero": lambda r: (-r.beta * r.chosen).sigmoid() + (r.beta * r.rejected).sigmoid(),
    "apo_down": lambda r: (
        (r.beta * r.chosen).sigmoid() + (-r.beta * (r.chosen - r.rejected)).sigmoid()
    ),
    "discopop": _discopop,
    "rejected_free": lambda r: -F.logsigmoid(r.beta * r.chosen),
}
# Which formulas take which option; an option given to another would silently do nothing.
SMOOTHED = ("sigmoid", "robust", "exo", "aot", "aot_unpaired")
OF_SCORES = ("sigmoid", "robust", "hinge", "exo", "discopop")
# Kinds that compare the pairs of a batch with each other.
SORTED = ("aot", "aot_unpaired")


def dpo_loss(
    logprob: Tensor,  # (2 · pairs, T), or (T,) packed
    mask: Tensor,
    reference: Tensor | None = None,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    length_normalized: bool = False,
    discopop_tau: float = 0.05,
    nll_weight: float = 0.0,
    nll: Literal["row", "token"] = "row",
    cu_seqlens: Tensor | None = None,
    num_pairs: float | Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    metrics: Metrics | None = None,
) -> Tensor:
    """Direct Preference Optimization (arXiv 2305.18290) and its relatives.

    With u⁺, u⁻ the log-ratios ``log π - log π_ref`` of the chosen and the rejected response (sums
    over tokens), s a score of them, u itself for the reverse KL, and ``h = beta * (s⁺ - s⁻)``::

        sigmoid        -(1 - ε) logσ(h) - ε logσ(-h)                 # ε: conservative DPO
        robust         (-(1 - ε) logσ(h) + ε logσ(-h)) / (1 - 2ε)    # arXiv 2403.00409
        hinge          relu(1 - h)                                   # arXiv 2309.06657
        ipo            (u⁺ - u⁻ - 1/(2 beta))²                       # arXiv 2310.12036
        exo            KL([σ(h), σ(-h)] ‖ [1 - ε, ε])                # arXiv 2402.00856, ε > 0
        nca            -logσ(βu⁺) - ½ logσ(-βu⁺) - ½ logσ(-βu⁻)      # arXiv 2402.05369
        bco            -logσ(βu⁺) - logσ(-βu⁻)                       # arXiv 2404.04656, no shift
        sppo           (u⁺ - 1/(2β))² + (u⁻ + 1/(2β))²               # arXiv 2405.00675, hard labels
        aot            sigmoid, after sorting log π⁺ - log π⁻ and log π_ref⁺ - log π_ref⁻
        aot_unpaired   sigmoid, after sorting u⁺ and u⁻              # arXiv 2406.05882
        apo_zero       σ(-βu⁺) + σ(βu⁻)                              # arXiv 2408.06266
        apo_down       σ(βu⁺) + σ(-β(u⁺ - u⁻))
        discopop       (1 - σ(h/τ)) · -logσ(h) + σ(h/τ) · exp(-h)    # arXiv 2406.08414
        rejected_free  -logσ(βu⁺); every row is a chosen one
        loss           that + nll_weight * negative log-likelihood of the chosen

    Args:
        logprob: log-probabilities of the targets, shifted, (B, T) or packed (T,); the chosen rows,
            then the rejected. Values at masked positions are never read.
        mask: same shape, bool or 0/1: response tokens.
        reference: of the frozen reference model: shaped like `logprob`, or sums (rows,); None is
            reference-free, ``log π_ref = 0``. No gradient flows into it.
        beta: strength of the KL constraint, above 0, default 0.1.
        kind: above.
        label_smoothing: ε, in [0, 0.5), of the kinds that have it above.
        divergence: s of u: "reverse_kl" u; "forward_kl" 1 - e⁻ᵘ; "js_divergence" log 2 + logσ(u);
            "alpha_divergence" (e^((α-1)u) - 1)/(α - 1) (arXiv 2309.16240). Exponents are cut at 40.
            Of "sigmoid", "robust", "hinge", "exo" and "discopop".
        alpha: α of that, any but 1 (which is "reverse_kl").
        length_normalized: u and s over the number of tokens. TRL's "ipo" and "sigmoid_norm" do so.
        discopop_tau: τ in (0, 1], default 0.05 as published.
        nll_weight: default 0; 1 is DPO + NLL (iterative RPO, arXiv 2404.19733: α, ``rpo_alpha``).
        nll: mean of that term over "row"s of their means, as published and in LLaMA-Factory
            (``pref_ftx``), or over "token"s of the batch, as TRL's loss type ``sft``.
        cu_seqlens: (2 · pairs + 1,): the rows are packed documents.
        num_pairs: divide by this instead of by the pairs here: those of the whole optimizer step.
            Not with "aot" and "aot_unpaired": sorting parts is not sorting the whole.
        num_items: the chosen tokens of the whole optimizer step, with `num_pairs` and
            ``nll="token"``.
        reduction: "mean" over pairs, or "none".
        metrics: a dict that gets rewards (βu), their margin and accuracy, log-probabilities.

    Returns:
        Scalar, or (pairs,). Pairs without any token are 0 and do not count in the mean.

    Raises:
        TypeError, ValueError: unknown option, one that the kind does not have, shapes that do not
            match, an odd number of rows.
    """
    _check(kind, label_smoothing, divergence, alpha, discopop_tau)
    if length_normalized and kind == "aot":
        raise ValueError("length_normalized: expected False with kind 'aot', got True")
    if num_pairs is not None and kind in SORTED:
        raise ValueError(
            f"num_pairs: expected None with kind {kind!r}, which sorts all pairs of a step: parts "
            "of a step do not add up to it"
        )
    check_pairs(beta, label_smoothing, reduction)
    tokens = PairTokens(logprob, mask, cu_seqlens) if kind != "rejected_free" else _Chosen(
        logprob, mask, cu_seqlens
    )  # fmt: skip
    policy = tokens.pair_sums(tokens.logprob)
    frozen = Pairs(torch.zeros_like(policy.chosen), torch.zeros_like(policy.rejected))
    if reference is not None:
        frozen = tokens.halves(tokens.sums_of("reference", reference).detach())
    ratios = Pairs(policy.chosen - frozen.chosen, policy.rejected - frozen.rejected)
    scores = Pairs(*(_score(u, divergence, alpha) for u in ratios))
    if length_normalized:
        lengths = [length.clamp(min=1) for length in tokens.lengths]
        ratios = Pairs(*(u / n for u, n in zip(ratios, lengths, strict=True)))
        scores = Pairs(*(s / n for s, n in zip(scores, lengths, strict=True)))
    margin = scores.chosen - scores.rejected
    if kind == "aot":
        sides = (policy.chosen - policy.rejected, frozen.chosen - frozen.rejected)
        margin = torch.sub(*(_sorted(x, tokens.counted) for x in sides))
    elif kind == "aot_unpaired":
        margin = torch.sub(*(_sorted(x, tokens.counted) for x in ratios))
    loss = FORMULAS[kind](Ratios(*ratios, beta * margin, beta, label_smoothing, discopop_tau))
    loss = loss + tokens.chosen_nll(nll_weight, nll, num_items, num_pairs)
    record_rewards(metrics, tokens, Pairs(beta * ratios.chosen, beta * ratios.rejected))
    return tokens.reduce(loss, reduction, num_pairs)


class _Chosen(PairTokens):
    """A batch of chosen responses alone: the rejected ones have no tokens, log-probability 0."""

    def halves(self, values: Tensor) -> Pairs:
        """Every row is chosen."""
        return Pairs(values, torch.zeros_like(values))


def _sorted(x: Tensor, counted: Tensor) -> Tensor:
    """The values of the counted pairs, ascending, at their places; others as if absent."""
    order = torch.where(counted, x.detach(), torch.inf).argsort(stable=True)
    places = (~counted).to(torch.int8).argsort(stable=True)
    return x[order][places.argsort()]


def _score(u: Tensor, divergence: str, alpha: float) -> Tensor:
    """f′(π/π_ref) of an f-divergence up to a constant, of the log-ratio `u`."""
    if divergence == "forward_kl":
        return 1 - (-u).clamp(max=LARGEST_EXPONENT).exp()
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(u)
    if divergence == "alpha_divergence":
        return torch.expm1(((alpha - 1) * u).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)
    return u


def _check(
    kind: str, label_smoothing: float, divergence: str, alpha: float, discopop_tau: float
) -> None:
    checks.one_of("kind", kind, FORMULAS)
    checks.one_of("divergence", divergence, DIVERGENCES)
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(f"label_smoothing: expected 0 with kind {kind!r}, got {label_smoothing}")
    if kind == "robust" and label_smoothing == 0.5:
        raise ValueError("label_smoothing: expected below 0.5 with kind 'robust', got 0.5")
    if kind == "exo" and not label_smoothing:
        raise ValueError(
            f"label_smoothing: expected above 0 with kind 'exo', got {label_smoothing}"
        )
    if divergence != "reverse_kl" and kind not in OF_SCORES:
        raise ValueError(
            f"divergence: expected 'reverse_kl' with kind {kind!r}, got {divergence!r}"
        )
    if divergence == "alpha_divergence" and checks.number("alpha", alpha) == 1:
        raise ValueError(
            "alpha: expected any number but 1, whose divergence is 'reverse_kl', got 1"
        )
    positive("discopop_tau", discopop_tau)
    if discopop_tau > 1:
        raise ValueError(f"discopop_tau: expected in (0, 1], got {discopop_tau}")


class DPOLoss(Loss):
    """`dpo_loss` with its options held by a module; call it on ``(logprob, mask, reference)``."""

    function = staticmethod(dpo_loss)
    pairs = True

    beta: float = 0.1
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    length_normalized: bool = False
    discopop_tau: float = 0.05
    nll_weight: float = 0.0
    nll: Literal["row", "token"] = "row"
    reduction: Literal["mean", "none"] = "mean"
