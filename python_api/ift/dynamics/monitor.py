"""Squeezing: the mass that negative gradients push off rare tokens goes to the argmax alone.

Its sign in training: the chosen answers lose probability while the greedy tokens gain. Its cause:
negative gradients on tokens in the *valley*, far less likely than the argmax of a peaked
distribution. docs/dynamics.md has the lemma.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ift.dynamics.evaluate import Measurement
from ift_kernels.common import checks

logger = logging.getLogger(__name__)

VALLEY = 1e-3  # p of the token, at most
PEAK = 0.5  # p of the argmax, at least


def in_valley(
    logprob: Tensor, argmax_logprob: Tensor, valley: float = VALLEY, peak: float = PEAK
) -> Tensor:
    """Bool per token: p of the token ≤ `valley` and p of the argmax ≥ `peak`."""
    return (logprob.exp() <= valley) & (argmax_logprob.exp() >= peak)


@dataclass
class SqueezeMonitor:
    """Compares every evaluation of a probe set with the first one.

    A record is flagged when the mean log-probability of the chosen answers has fallen by more than
    `tolerance` since the first evaluation while that of the greedy tokens in their place has risen
    by more than `tolerance`. The record also counts the tokens of rejected answers, which
    preference losses give negative gradients, and those of them in the valley.

    Args:
        chosen: the type that should rise.
        negative: the types that get negative gradients.
        tolerance: nats per token, default 0.01.
        valley, peak: a token is in the valley with p ≤ `valley` (default 1e-3) under an argmax
            with p ≥ `peak` (default 0.5).

    Raises:
        TypeError: `negative` is one text and not several.
        ValueError: a tolerance below 0, a valley or peak outside [0, 1].
    """

    chosen: str = "chosen"
    negative: tuple[str, ...] = ("rejected",)
    tolerance: float = 0.01
    valley: float = VALLEY
    peak: float = PEAK
    first: dict[str, float] | None = field(default=None, init=False)
    flagged: int | None = field(default=None, init=False)  # the step of the first flag

    def __post_init__(self) -> None:
        if isinstance(self.negative, str):  # its characters would be types
            raise TypeError(f"negative: expected a tuple of types, got {self.negative!r}")
        checks.unit_interval("valley", self.valley)
        checks.unit_interval("peak", self.peak)
        if not checks.number("tolerance", self.tolerance) >= 0:
            raise ValueError(f"tolerance: expected a number ≥ 0, got {self.tolerance}")

    def update(
        self, step: int, types: Mapping[str, Mapping[str, float]], found: Sequence[Measurement]
    ) -> dict[str, Any]:
        """The record of this evaluation.

        Args:
            step: the optimizer step.
            types: type → means over the probes, as in the record.
            found: the measurements themselves.

        Returns:
            ``chosen`` and ``greedy``, the changes since the first evaluation in nats per token
            (absent without chosen answers); ``negative_tokens`` and ``valley_tokens``; ``flag``.
        """
        negative = valley = 0
        for one in found:
            if one.type in self.negative:
                negative += one.logprob.numel()
                in_the_valley = in_valley(one.logprob, one.argmax_logprob, self.valley, self.peak)
                valley += int(in_the_valley.sum())
        record: dict[str, Any] = {
            "negative_tokens": negative,
            "valley_tokens": valley,
            "flag": False,
        }
        if self.chosen in types:
            now = {"chosen": types[self.chosen]["mean_logprob"],
                   "greedy": types[self.chosen]["greedy_logprob"]}  # fmt: skip
            self.first = self.first or now
            record |= {name: value - self.first[name] for name, value in now.items()}
            record["flag"] = (
                record["chosen"] < -self.tolerance and record["greedy"] > self.tolerance
            )
        if record["flag"] and self.flagged is None:
            self.flagged = step
            logger.warning(
                "squeezing at step %d: chosen answers %+.3f nats per token since the first "
                "evaluation, greedy tokens %+.3f; %d of %d rejected tokens in the valley",
                step, record["chosen"], record["greedy"], valley, negative,
            )  # fmt: skip
        return record

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Set the first evaluation and the first flag from the records of a log."""
        self.first = self.flagged = None
        for record in records:
            chosen = record["types"].get(self.chosen)
            measured = chosen is not None and chosen["mean_logprob"] is not None
            if self.first is None and measured:
                self.first = {"chosen": chosen["mean_logprob"], "greedy": chosen["greedy_logprob"]}
            if self.flagged is None and record.get("squeeze", {}).get("flag"):
                self.flagged = record["step"]


def before_and_after(records: Sequence[Mapping[str, Any]]) -> str:
    """A line on the first and the last evaluation of a log; "" where there are not two."""
    if len(records) < 2:
        return ""
    first, last = records[0], records[-1]
    parts = [f"steps {first['step']} → {last['step']}"]
    for name, key in (("chosen", "mean_logprob"), ("rejected", "mean_logprob"),
                      ("chosen", "greedy_logprob")):  # fmt: skip
        if name in first["types"] and name in last["types"]:
            a, b = first["types"][name][key], last["types"][name][key]
            label = "argmax in place of chosen" if key == "greedy_logprob" else name
            if a is not None and b is not None:
                parts.append(f"{label} {a:.3f} → {b:.3f}")
    a, b = first.get("squeeze", {}), last.get("squeeze", {})
    if b.get("negative_tokens"):
        parts.append(
            f"rejected tokens in the valley {a.get('valley_tokens', 0)} → {b['valley_tokens']} "
            f"of {b['negative_tokens']}"
        )
    flags = [r["step"] for r in records if r.get("squeeze", {}).get("flag")]
    parts.append(f"squeezing flagged from step {flags[0]}" if flags else "no squeezing flagged")
    return "; ".join(parts)
