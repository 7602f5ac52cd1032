"""What operators on a head take and return of an adapter: their last arguments and results."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

Needs = tuple[bool, bool, bool]


class AdapterTensors(NamedTuple):
    """Of `schedule.adapter`; an operator always has all three, and None where there is none."""

    low_rank_hidden: Tensor | None = None  # (N, r)
    low_rank_weight: Tensor | None = None  # (V, r)
    column_scale: Tensor | None = None  # (V,)

    @property
    def given(self) -> bool:
        return self.low_rank_hidden is not None or self.column_scale is not None


SCHEMA = ", ".join(f"Tensor? {name}" for name in AdapterTensors._fields)
GRADIENTS = ", ".join(f"Tensor d_{name}" for name in AdapterTensors._fields)


def head_needs(needs: list[bool]) -> Needs:
    """Of an operator's `needs`, those of hidden, weight and bias."""
    return needs[0], needs[1], needs[2]


def adapter_needs(needs: list[bool]) -> Needs:
    """Of an operator's `needs`, those of `AdapterTensors`."""
    return needs[3], needs[4], needs[5]


def needed(ctx: Any) -> list[bool]:
    """`needs` of an operator whose first inputs are hidden, weight and bias."""
    return [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[-3:]]


def input_gradients(
    results: tuple[Tensor, ...], needs: list[bool], nothing: tuple[None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of such an operator, `nothing` being those of the inputs between."""
    found = [g if need else None for g, need in zip(results, needs, strict=True)]
    return (*found[:3], *nothing, *found[3:])


def gradients_fake(
    hidden: Tensor, adapter: tuple[Tensor | None, ...], needs: list[bool]
) -> tuple[Tensor, ...]:
    """Shapes of the gradients of an adapter that are asked for, empty for the others."""
    pairs = zip(adapter, adapter_needs(needs), strict=True)
    return tuple(
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0) for x, need in pairs
    )
