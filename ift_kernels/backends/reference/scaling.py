"""A gradient times its upstream gradient, which is 1 where a loss itself is differentiated."""

from __future__ import annotations

from torch import Tensor


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """``gradient *= factor``, a tensor of one element, read only where that costs no stall."""
    if factor.device.type != "cpu" or float(factor) != 1.0:
        gradient.mul_(factor)
