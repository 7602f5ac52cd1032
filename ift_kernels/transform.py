"""From the raw product of hidden states and head weight to logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """``z = softcap·tanh(scale·(x + bias) / softcap) / temperature``; softcap 0 means none."""

    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0

    @classmethod
    def checked(
        cls, logit_scale: float, softcap: float | None, temperature: float
    ) -> LogitTransform:
        """The transform of the public arguments, or a ValueError that names the bad one."""
        if not math.isfinite(logit_scale):
            raise ValueError(f"logit_scale: expected a finite number, got {logit_scale}")
        if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
            raise ValueError(f"softcap: expected None or a positive finite number, got {softcap}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
        return cls(float(logit_scale), float(softcap or 0.0), float(temperature))

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of raw products `x` (…, V), in the dtype of `x`."""
        z = x if bias is None else x + bias.to(x.dtype)
        z = z * self.scale
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    def derivative(self, z: Tensor) -> Tensor | float:
        """∂z/∂x, from the logits `z` themselves."""
        slope = self.scale / self.temperature
        if not self.softcap:
            return slope
        return slope * (1.0 - (z * (self.temperature / self.softcap)).square())
