"""The operator behind a cross-entropy against probabilities that a function gives in chunks.

Operators take no function, so that goes by a number under which it is found while it is alive.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ift_kernels.operators import head_call, library, linear_stats
from ift_kernels.operators.adapter import Needs
from ift_kernels.schedule import dense_targets
from ift_kernels.schedule.accumulate import accum_dtype

Source = Callable[[slice], Tensor]  # columns to probabilities (N, C), in accum_dtype


class _Holder:
    """Keeps a function alive: for the call, and until backward."""

    def __init__(self, source: Source) -> None:
        self.source = source


_numbers = itertools.count()
_holders: weakref.WeakValueDictionary[int, _Holder] = weakref.WeakValueDictionary()


def cross_entropy(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    valid: Tensor,  # (N,) bool
    source: Source,
    options: head_call.Options,
) -> tuple[Tensor, Tensor]:
    """Σ q·(lse − z) and lse of every row, 0 where not valid, both differentiable."""
    if torch.compiler.is_compiling():  # a graph would outlive the function
        raise RuntimeError(
            "probs: a function cannot be part of a compiled graph, expected a call outside of "
            "torch.compile, or probabilities with ids"
        )
    holder, number = _Holder(source), next(_numbers)
    _holders[number] = holder
    cross, lse, _, _ = torch.ops.ift_kernels.linear_dense_targets(
        hidden, weight, bias, valid, number, *options
    )
    return cross, lse


def _call(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    valid: Tensor,
    number: int,
    options: head_call.Options,
    needs: Needs,
) -> tuple[head_call.Call, dense_targets.DenseTargets]:
    """The call of the valid rows."""
    call = head_call.Call(*tensors, head_call.ValidRows.of(valid), options, needs)
    source = _holders[number].source

    def of_valid_rows(columns: slice) -> Tensor:
        with torch.no_grad():
            probs = source(columns)
        if call.valid_mask is not None:
            probs = probs.masked_fill(~call.valid_mask[:, None], 0.0)
        return probs if call.rows is None else probs.index_select(0, call.rows)

    return call, dense_targets.DenseTargets(call.head, of_valid_rows, call.problem.workspace)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor, number: int, *numbers: Any
) -> tuple[Tensor, ...]:
    options = head_call.Options(*numbers)
    with torch.autocast(hidden.device.type, enabled=False):
        call, targets = _call((hidden, weight, bias), valid, number, options, (False,) * 3)
        rows = targets.values()
    dtype = accum_dtype(options.dtype)
    return (
        call.scatter(rows.cross, dtype),
        call.scatter(rows.lse, dtype),
        call.scatter(rows.total, torch.float64),
        call.scatter(rows.norm, dtype),
    )


def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype, n = accum_dtype(head_call.Options(*rest[4:]).dtype), len(hidden)
    shapes = ((n, dtype), (n, dtype), (n, torch.float64), ((2, n), dtype))
    return tuple(hidden.new_empty(shape, dtype=of) for shape, of in shapes)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor,
    total: Tensor,
    norm: Tensor,
    d_cross: Tensor,
    d_lse: Tensor,
    number: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, needs = rest
    options, dtype = head_call.Options(*numbers), norm.dtype
    # A NaN upstream is not 0 and so stays in.
    valid = valid & ((d_cross != 0) | (d_lse != 0))
    with torch.autocast(hidden.device.type, enabled=False):
        call, targets = _call((hidden, weight, bias), valid, number, options, tuple(needs))
        norm = call.select(norm).contiguous()
        d_cross, d_lse = (call.select(x.masked_fill(~valid, 0)).double() for x in (d_cross, d_lse))
        upstream = linear_stats.Upstream(lse=(d_cross * call.select(total) + d_lse).to(dtype))
        coef = linear_stats.row_coefficients(norm, norm[0], len(weight), upstream)
        results = targets.gradients(norm, d_cross, coef, tuple(needs), hidden.dtype)
    return linear_stats.gradient_outputs(call, results, bias)


def _backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs = rest
    return linear_stats.gradients_fake(hidden, weight, bias, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.number = inputs[:5]
    _, _, total, norm = output
    ctx.mark_non_differentiable(total, norm)
    ctx.save_for_backward(*tensors, total, norm)
    ctx.options, ctx.holder = inputs[5:], _holders[ctx.number]


def _autograd(ctx: Any, d_cross: Tensor, d_lse: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    results = torch.ops.ift_kernels.linear_dense_targets_backward(
        *ctx.saved_tensors, d_cross, d_lse, ctx.number, *ctx.options, needs
    )
    nothing: tuple[None, ...] = (None,) * (len(ctx.options) + 2)
    return (*(g if need else None for g, need in zip(results, needs, strict=True)), *nothing)


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor valid"
library.register(
    f"linear_dense_targets({_HEAD}, int source, {linear_stats.OPTIONS})"
    " -> (Tensor cross, Tensor lse, Tensor total, Tensor norm)",
    _forward,
    _fake,
    _autograd,
    _setup,
)
library.register(
    f"linear_dense_targets_backward({_HEAD}, Tensor total, Tensor norm, Tensor d_cross,"
    f" Tensor d_lse, int source, {linear_stats.OPTIONS}, bool[] needs)"
    f" -> ({linear_stats.GRADIENTS})",
    _backward,
    _backward_fake,
    library.no_second_derivative("linear_soft_cross_entropy"),
)
