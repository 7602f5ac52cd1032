"""Adapters of the calls: an adapted head is a plain one, of hidden states and weights that are
longer by the rank, with its rows scaled. So are its exact results and most of its bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ift.numerics import bounds

RANK = 3


@dataclass(frozen=True)
class Adapter:
    """Tensors by name, of "low_rank[0]", "low_rank[1]" and "column_scale", and the same exact."""

    given: dict[str, Tensor] = field(default_factory=dict)
    exact: dict[str, Tensor] = field(default_factory=dict)  # fp64, flat, on the CPU

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the operations."""
        found = {name: t for name, t in self.given.items() if name == "column_scale"}
        if "low_rank[0]" not in self.given:
            return found
        return {**found, "low_rank": (self.given["low_rank[0]"], self.given["low_rank[1]"])}

    def joined(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and weight of the plain head."""
        if "low_rank[0]" in self.exact:
            hidden = torch.cat([hidden, self.exact["low_rank[0]"].to(hidden)], 1)
            weight = torch.cat([weight, self.exact["low_rank[1]"].to(weight)], 1)
        if "column_scale" in self.exact:
            weight = weight * self.exact["column_scale"][:, None]
        return hidden, weight

    def _scale(self, weight: Tensor) -> Tensor:
        scale = self.exact.get("column_scale")
        return weight.new_ones(len(weight)) if scale is None else scale.detach()

    def _raw(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The joined operands before their scale."""
        joined, scaled = (x.detach() for x in self.joined(hidden, weight))
        return joined, scaled / self._scale(weight)[:, None]

    def rounded(self, hidden: Tensor, weight: Tensor, units: bounds.Units) -> Tensor | float:
        """Of a product: the head's own is rounded, then both together, then the scaled one."""
        if not self.exact:
            return 0.0
        joined, raw = self._raw(hidden, weight)
        steps = (hidden @ weight.T).abs() + (joined @ raw.T).abs()
        underflow = 2 * units.underflow if units.logit > units.sum else 0.0
        return self._scale(weight).abs() * (units.logit * steps + underflow)

    def gradients(
        self, head: bounds.Head, hidden: Tensor, weight: Tensor, dz: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Errors that the gradients of all tensors are allowed, by name."""
        units, width, scale = head.units, hidden.shape[1], self._scale(weight)
        gradient, error, *terms = dz
        if "column_scale" in self.exact:  # rounded once more
            error = error + units.dlogit * gradient.abs() + units.underflow
        joined, scaled = (x.detach() for x in self.joined(hidden, weight))
        found = bounds.gradients(head, joined, scaled, gradient, error, *terms)
        of_rows = scale.abs()[:, None] * found.weight + units.underflow
        named = {
            "hidden": found.hidden[:, :width], "weight": of_rows[:, :width], "bias": found.bias,
            "low_rank[0]": found.hidden[:, width:], "low_rank[1]": of_rows[:, width:],
        }  # fmt: skip
        if "column_scale" not in self.exact:
            return named
        # Of e·x, the sum of gradients times scaled products over the scale.
        joined, raw = self._raw(hidden, weight)
        x, e = (joined @ raw.T).abs(), (gradient * head.slope).abs()
        x_error = self.rounded(hidden, weight, units) / scale.abs() + 2 * units.logit * x
        sizes = bounds.products_unit(joined.shape[1], units.sum) * (joined.abs() @ raw.abs().T)
        size = gradient.abs() if not terms else terms[0]
        e_error = error * (head.slope.abs() + head.slope_error) + size * head.slope_error
        e_error = e_error + units.dlogit * e + units.underflow
        rounding = bounds.products_unit(len(x), units.sum) + bounds.ROUNDINGS * units.result
        summed = e_error * (x + x_error) + e * (x_error + sizes)
        summed = summed + (rounding + 2 * units.dlogit) * e * x + 2 * units.underflow
        total = summed.sum(0) + units.underflow
        overflows = bool((e * x > units.largest / 4).any())
        named["column_scale"] = total.masked_fill(total.isnan() | overflows, torch.inf)
        return named


def make(
    kind: str,
    shape: Sequence[int],
    vocabulary: int,
    dtype: torch.dtype,
    device: str,
    learns: bool,
    seed: int,
) -> Adapter:
    """A random one; `kind`: "low_rank", "column_scale" or "both"."""
    g = torch.Generator().manual_seed(seed + 23)
    given: dict[str, Tensor] = {}
    if kind != "column_scale":
        given["low_rank[0]"] = torch.randn(*shape, RANK, generator=g)
        given["low_rank[1]"] = torch.randn(vocabulary, RANK, generator=g) / 2
    if kind != "low_rank":  # fp16 holds what it scales
        sign = torch.where(torch.rand(vocabulary, generator=g) < 0.3, -1.0, 1.0)
        given["column_scale"] = sign * (0.5 + torch.rand(vocabulary, generator=g) / 2)
    given = {n: t.to(device, dtype).requires_grad_(learns) for n, t in given.items()}
    exact = {
        n: t.detach().cpu().double().view(-1, RANK) if t.dim() > 1 else t.detach().cpu().double()
        for n, t in given.items()
    }
    for t in exact.values():
        t.requires_grad_(learns)
    return Adapter(given, exact)
