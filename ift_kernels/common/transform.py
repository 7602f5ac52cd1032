"""From the raw product of hidden states and head weight to logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ift_kernels.common import checks

_MIN_FACTOR = 1e-18  # kernels divide by, and multiply with, temperature and softcap in float32


@dataclass(frozen=True)
class LogitTransform:
    """``z = softcap·tanh(scale·(x + bias) / softcap) / temperature``; softcap 0 means none."""

    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0

    @classmethod
    def checked(
        cls, logit_scale: float, softcap: float | None, temperature: float, of: str = ""
    ) -> LogitTransform:
        """The transform of the public arguments, or a ValueError that names the bad one.

        `of` is what the names of the first two start with.
        """
        scale = checks.number(f"{of}logit_scale", logit_scale)
        cap = 0.0 if softcap is None else checks.number(f"{of}softcap", softcap)
        temperature = checks.number("temperature", temperature)
        if not abs(scale) < float("inf"):  # math.isfinite would break a compiled graph
            raise ValueError(f"{of}logit_scale: expected a finite number, got {scale}")
        if softcap is not None and not _MIN_FACTOR <= cap <= 1 / _MIN_FACTOR:
            raise ValueError(
                f"{of}softcap: expected None or a positive number that float32 can divide by, "
                f"got {cap}"
            )
        if not _MIN_FACTOR <= temperature <= 1 / _MIN_FACTOR:
            raise ValueError(
                f"temperature: expected a positive number that float32 can divide by, "
                f"got {temperature}"
            )
        return cls(scale, cap, temperature)

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of raw products `x` (…, V), in the dtype of `x`."""
        z = x if bias is None else x + bias.to(x.dtype)
        z = z * self.scale
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    @property
    def lowest_product(self) -> float:
        """A product whose logit is the lowest there is; −inf unless `bounded`."""
        return -math.inf * self.scale if self.scale else 0.0

    @property
    def bounded(self) -> bool:
        """Whether no product gives a logit of −inf."""
        return bool(self.softcap) or self.scale == 0.0

    def derivative(self, z: Tensor) -> Tensor | float:
        """∂z/∂x, from the logits `z` themselves."""
        slope = self.scale / self.temperature
        if not self.softcap:
            return slope
        return slope * (1.0 - (z * (self.temperature / self.softcap)).square())
