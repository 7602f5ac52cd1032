"""`IFTConfig`: every option of an IFT forward, checked once, and λ as a function of the step."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from typing import Any, Literal

import torch
from torch import Tensor

from ift.head_options import HeadOptions
from ift.losses.ift import Objective, check_objective
from ift_kernels.common import checks
from ift_kernels.propagation import Kind, Norm, Side

Rule = Literal["greedy", "kth", "sample", "soft"]
RULES = ("greedy", "kth", "sample", "soft")
LAMBDA_SCHEDULES = ("constant", "linear")

# `lam_noise` of the released code.
RELEASED_LAM_NOISE = 0.5


@dataclasses.dataclass(frozen=True)
class IFTConfig:
    """Options of one IFT forward; the defaults are those of the released code.

    With the default objective the gradient of a token's loss can be *negative*: on spans whose
    losses lie well below the row's own weighted mean, training makes easy tokens less likely (the
    formula is at `ift.losses.ift_loss`). ``detach_weights=True`` or another objective avoids it.

    Args:
        lam: share λ of the predicted token in the second pass's input embeddings, in [0, 1]. With a
            schedule, its largest value. λ = 0 and γ = 0 together are supervised fine-tuning.
        gamma: discount γ per position of the propagated relation, in [0, 1].
        objective: "released", "paper" (equation 21) or "algorithm1"; they are not equivalent.
        propagation: kind of weights, "loss", "logps" or "mask"; "released" only, like the next two.
        side: "left" (losses that follow) or "right" (inverse of the losses that precede).
        norm: "L1", "L2", "softmax" or "log".
        detach_weights: keep the weights out of the gradient; the released code does not.
        rule: the predicted token: "greedy"; "kth", the `k`-th best; "sample", drawn at
            `sample_temperature` (what the released code calls nucleus); "soft", the mean embedding
            under the whole distribution (ours).
        k: rank for rule "kth", from 1 (greedy).
        sample_temperature: positive, for rule "sample".
        embedding_grad: let gradient reach the input embedding through the second pass's inputs. The
            released code uses a frozen copy. Where input and output embeddings are not tied, False
            leaves the input embedding without any gradient: freeze it before DDP wraps the model.
        lambda_schedule: "constant", or "linear" from `min_lam` to `lam` over `warmup_steps`.
        min_lam: λ at step 0 of the linear schedule, in [0, lam].
        warmup_steps: steps, at least 0, of the linear schedule.
        lam_noise: standard deviation σ ≥ 0: multiply λ by 1 + σn, n ~ N(0, 1) anew each step, then
            clamp to [0, 1]. 0: no noise; the released code has 0.5 where it has any.
        seed: of the λ noise and of rule "sample", a non-negative integer below 2**63.
        step: the optimizer step of this forward, at least 0; the trainer sets it with `replace`.
        num_rows: rows with response tokens in the whole optimizer step, as in `ift_loss`.
        share_prompt: run prompts once for both passes where that gives the same; with less memory
            and time. False: two full passes always.
        logits_dtype: of the head in both passes, torch.float32 or "float32", as in `ift.patch`;
            None: that of the patch. The attribute is the text.
        deterministic: of the head in both passes, as in `ift.patch`; None: that of the patch. Not
            with rule "soft".
        workspace: bytes of work memory of the head operations, from 1 MiB; None: their default.

    Raises:
        TypeError, ValueError: an option of the wrong type or outside its range, by name.
    """

    lam: float = 0.2
    gamma: float = 0.95
    objective: Objective = "released"
    propagation: Kind = "loss"
    side: Side = "left"
    norm: Norm = "L1"
    detach_weights: bool = False
    rule: Rule = "greedy"
    k: int = 2
    sample_temperature: float = 0.7
    embedding_grad: bool = False
    lambda_schedule: Literal["constant", "linear"] = "constant"
    min_lam: float = 0.0
    warmup_steps: int = 0
    lam_noise: float = 0.0
    seed: int = 0
    step: int = 0
    num_rows: float | Tensor | None = None
    share_prompt: bool = True
    logits_dtype: torch.dtype | str | None = None
    deterministic: bool | None = None
    workspace: int | None = None

    def __post_init__(self) -> None:
        for name in ("lam", "gamma", "min_lam"):
            checks.unit_interval(name, getattr(self, name))
        for name in ("detach_weights", "embedding_grad", "share_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        check_objective(self.objective, self.propagation, self.side, self.norm)
        checks.one_of("rule", self.rule, RULES)
        checks.one_of("lambda_schedule", self.lambda_schedule, LAMBDA_SCHEDULES)
        for name, least in (("k", 1), ("warmup_steps", 0), ("seed", 0), ("step", 0)):
            _whole(name, getattr(self, name), least)
        head = HeadOptions().changed(
            logits_dtype=self.logits_dtype, deterministic=self.deterministic
        )
        head.check_rule(self.rule)
        # As JSON can hold it, whichever was given.
        object.__setattr__(self, "logits_dtype", None if head.logits_dtype is None else "float32")
        if self.workspace is not None:
            _whole("workspace", self.workspace, checks.MIN_WORKSPACE)
        noise = checks.number("lam_noise", self.lam_noise)
        if not (noise >= 0 and math.isfinite(noise)):
            raise ValueError(f"lam_noise: expected a finite number of at least 0, got {noise}")
        temperature = self.sample_temperature
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"sample_temperature: expected a float, got {temperature!r}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(
                f"sample_temperature: expected a positive finite number, got {temperature}"
            )
        if self.lambda_schedule == "linear" and self.min_lam > self.lam:
            raise ValueError(f"min_lam: expected at most lam = {self.lam}, got {self.min_lam}")
        _count("num_rows", self.num_rows)

    def lam_at(self, step: int) -> float:
        """λ at an optimizer step: a pure function, so that a resumed run repeats an unbroken one.

        ``lam``, or ``min_lam + (lam - min_lam) * min(1, step / warmup_steps)`` under the linear
        schedule; times ``1 + lam_noise * n``, n ~ N(0, 1) keyed by (seed, step); in [0, 1].

        Raises:
            TypeError, ValueError: `step` not an integer, or negative.
        """
        _whole("step", step, 0)
        lam = float(self.lam)
        if self.lambda_schedule == "linear" and step < self.warmup_steps:
            lam = self.min_lam + (lam - self.min_lam) * step / self.warmup_steps
        if self.lam_noise:
            lam *= 1.0 + self.lam_noise * _standard_normal(self.seed, step)
        return min(1.0, max(0.0, lam))

    def replace(self, **changes: Any) -> IFTConfig:
        """A copy with some options changed, checked like any other."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def paper(cls, **changes: Any) -> IFTConfig:
        """The paper's recipe: λ 0.2, γ 0.95 and its objective as printed (equation 21).

        The training around it, as the paper reports it, is the trainer's to set: RMSprop at
        learning rate 5e-7, cosine decay, batch 512, bf16, length at most 1024, 3 epochs, on
        Mistral-7B-v0.1. Those runs come from the released code, whose objective is this class's
        default instead: ``IFTConfig.paper(objective="released")``, as `ift train --preset paper`.
        """
        return cls(**{"lam": 0.2, "gamma": 0.95, "objective": "paper", **changes})

    @classmethod
    def noisy(cls, **changes: Any) -> IFTConfig:
        """The recipe with a noisy λ: that of `paper`, with ``lam_noise=0.5``.

        λ rises linearly from `min_lam` over `warmup_steps`, if any are given.
        """
        noise = {"lam_noise": RELEASED_LAM_NOISE, "lambda_schedule": "linear"}
        return cls.paper(**{**noise, **changes})


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not least <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")


def _count(name: str, value: object) -> None:
    if value is None or isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or None, got {value!r}")
    if not value >= 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")


def _standard_normal(seed: int, step: int) -> float:
    """One N(0, 1) draw that is a function of (seed, step) alone, the same on every platform."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, step), digest_size=16).digest()
    radius, angle = ((word + 0.5) / 2**64 for word in struct.unpack("<QQ", digest))
    return math.sqrt(-2.0 * math.log(radius)) * math.cos(2.0 * math.pi * angle)
