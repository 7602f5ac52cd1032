"""The operator behind label smoothing with class weights: a weighted sum of a row's products.

``hidden @ (class_weight @ weight)``: two matrix-vector products, in float64 beyond the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.operators import library
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import slices

ROWS = 1024  # of the head, cast at once


def _products(hidden: Tensor, weight: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
    accum = accum_dtype(weight.dtype)
    total = hidden.new_zeros(weight.shape[1], dtype=torch.float64)
    with torch.autocast(weight.device.type, enabled=False):
        for rows in slices(0, len(weight), ROWS):
            total += class_weight[rows].to(accum) @ weight[rows].to(accum)
    return (hidden.double() * total).sum(-1), total


def _fake(hidden: Tensor, weight: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
    product = hidden.new_empty(len(hidden), dtype=torch.float64)
    return product, hidden.new_empty(weight.shape[1], dtype=torch.float64)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    class_weight: Tensor,
    total: Tensor,
    d_product: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    upstream, d_hidden, d_weight = d_product[:, None], hidden.new_empty(0), hidden.new_empty(0)
    if needs[0]:
        d_hidden = (upstream * total).to(hidden.dtype)
    if needs[1]:
        # Rows without upstream gradient send none, even where they have a NaN.
        d_total = (hidden.double() * upstream).masked_fill(upstream == 0, 0).sum(0)
        d_weight = weight.new_empty(weight.shape)
        for rows in slices(0, len(weight), ROWS):
            d_weight[rows] = class_weight[rows, None] * d_total
    return d_hidden, d_weight


def _backward_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, needs = rest
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape) if needs[1] else hidden.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _autograd(ctx: Any, d_product: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    results = torch.ops.ift_kernels.weighted_products_backward(*ctx.saved_tensors, d_product, needs)
    return (*(g if need else None for g, need in zip(results, needs, strict=True)), None)


_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor class_weight"
library.register(
    f"weighted_products({_ARGUMENTS}) -> (Tensor product, Tensor total)",
    _products,
    _fake,
    _autograd,
    _setup,
)
library.register(
    f"weighted_products_backward({_ARGUMENTS}, Tensor total, Tensor d_product, bool[] needs)"
    " -> (Tensor d_hidden, Tensor d_weight)",
    _backward,
    _backward_fake,
    library.no_second_derivative("linear_cross_entropy"),
)
