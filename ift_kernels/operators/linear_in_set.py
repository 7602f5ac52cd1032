"""The operator behind sets of ids without the rest: products of a row with its own head rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.operators import library, linear_stats
from ift_kernels.operators.head_call import Options, ValidRows
from ift_kernels.operators.linear_selected import ARGUMENTS, check_ids
from ift_kernels.schedule import gathered
from ift_kernels.schedule.accumulate import accum_dtype


def _products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, valid: Tensor, *rest: Any
) -> Tensor:
    options = Options(*rest)
    wrong = check_ids(ids, options.ignore_index, len(weight))
    product = ids.new_zeros(ids.shape, dtype=accum_dtype(options.dtype))
    rows, found, there = _valid(ids, valid, options.ignore_index, len(weight))
    some = hidden if rows is None else hidden.index_select(0, rows)
    with torch.autocast(hidden.device.type, enabled=False):
        made = gathered.products(some, weight, found, options.dtype, options.workspace)
    made = torch.where(there, made, 0).to(product.dtype)
    product = made if rows is None else product.index_copy_(0, rows, made)
    return product.masked_fill_(wrong[:, None], torch.nan)


def _valid(
    ids: Tensor, valid: Tensor, ignore_index: int, vocabulary: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The valid rows, None for all, their ids, 0 for padding, and which are no padding."""
    rows = ValidRows.of(valid).ids
    found = ids if rows is None else ids.index_select(0, rows)
    there = found != ignore_index
    # Outside of the vocabulary, on a GPU: such a row is NaN.
    return rows, torch.where(there, found, 0).clamp(0, vocabulary - 1), there


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, valid: Tensor, *rest: Any
) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=accum_dtype(Options(*rest).dtype))


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    d_product: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, needs = rest
    options = Options(*numbers)
    nonzero_grad_rows = valid & ((d_product != 0) & (ids != options.ignore_index)).any(1)
    rows, found, there = _valid(ids, nonzero_grad_rows, options.ignore_index, len(weight))
    some = hidden if rows is None else hidden.index_select(0, rows)
    upstream = d_product if rows is None else d_product.index_select(0, rows)
    with torch.autocast(hidden.device.type, enabled=False):
        d_hidden, d_weight, d_bias = gathered.gradients(
            some, weight, found, torch.where(there, upstream, 0), tuple(needs), options.dtype,
            options.workspace,
        )  # fmt: skip
    if d_hidden is not None and rows is not None:
        d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_hidden)
    empty = hidden.new_empty(0)
    return (
        empty if d_hidden is None else d_hidden,
        empty.clone() if d_weight is None else d_weight,
        empty.clone() if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs = rest
    return linear_stats.gradients_fake(hidden, weight, bias, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, d_product: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    results = torch.ops.ift_kernels.linear_in_set_backward(
        *ctx.saved_tensors, d_product, *ctx.options, needs
    )
    nothing: tuple[None, ...] = (None,) * (len(ctx.options) + 2)
    return (*(g if need else None for g, need in zip(results, needs, strict=True)), *nothing)


library.register(
    f"linear_in_set({ARGUMENTS}, {linear_stats.OPTIONS}) -> Tensor product",
    _products,
    _fake,
    _autograd,
    _setup,
)
library.register(
    f"linear_in_set_backward({ARGUMENTS}, Tensor d_product, {linear_stats.OPTIONS}, bool[] needs)"
    f" -> ({linear_stats.GRADIENTS})",
    _backward,
    _backward_fake,
    library.no_second_derivative("linear_selected_logprobs"),
)
