"""The operator behind per-token results of a frozen head: forward forms dh up to two factors.

Of a row with target t, upstream gradients a of logp_t and c of lse, and slopes s_j = ∂z_j/∂x_j,

    dh = (a·(1 − p_t) + c·p_t)·s_t·W_t + (c − a)·Σ_{j≠t} p_j·s_j·W_j

The sum is known in forward, whatever a and c will be, and is as small as dh: products are formed
once, not twice, and what is kept for backward is (N, D). The target is apart because 1 − p_t
would be lost in a 16-bit sum that p_t is part of. Gradients of entropy and of the mean logit would
each need a sum of their own: such calls go through `linear_stats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends import contract
from ift_kernels.common import sync_free
from ift_kernels.operators import head_call, library, linear_stats
from ift_kernels.schedule import gradients, plan, products
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import slices

NEEDS = (True, False, False)
DIFFERENTIABLE = ("logprob", "lse", "target_logit")
GATHERED = 1 << 20  # elements of head rows at once on a CPU, in cache; a GPU wants few launches


def serves(needs: list[bool], differentiable: int) -> bool:
    """Whether forward can form dh up to two factors per row."""
    # In sync-free mode rows that are not valid are still there: 0 times their NaN would not be 0.
    return (
        tuple(needs) == NEEDS
        and not differentiable & (contract.TRACK_ENTROPY | contract.TRACK_MEAN)
        and not sync_free.on()
    )


def _frozen(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, track, numbers = rest
    valid, vocabulary = target != options[0], weight.shape[0]
    head_call.check_targets(target, valid, vocabulary)
    active = head_call.active_hidden(numbers)
    valid_rows = head_call.ValidRows.of(valid)
    arguments = hidden, weight, bias, valid_rows, head_call.Options(*options), NEEDS
    call = head_call.Call(*arguments, grads_in_forward=True, active=active)
    chosen = plan.make(call.problem, plan.ledger.reserved, "forward")
    rows, accum = call.select(target), accum_dtype(call.dtype)
    state, argmax = contract.new_state(len(rows), hidden.device)
    target_coef = state.new_zeros((2, len(rows)))
    done = 0

    def coefficients(part: Tensor, ids: Tensor) -> contract.RowGradient:
        nonlocal done
        here = slice(done, done := done + len(ids))
        state[:, here], argmax[here] = part, ids
        row = linear_stats.row_values(part, ids, vocabulary, 0)
        zero, p, others = torch.zeros_like(row.logprob), row.logprob.exp(), -row.logprob.expm1()
        target_coef[0, here], target_coef[1, here] = others, p
        coef = torch.stack([-p, others, zero, zero])  # p_j, 0 for the target
        return contract.RowGradient(rows, row.norm.to(accum), call.drop(coef.to(accum), here))

    nontarget_sum = hidden.new_empty((0, hidden.shape[1]))
    with torch.autocast(hidden.device.type, enabled=False):
        # Of no row nothing is kept either, and backward forms it.
        if chosen.schedule == "forward" and call.count:
            formed = gradients.in_forward(
                call.head, rows, coefficients, NEEDS, hidden.dtype, chosen, track, active
            )
            assert formed[0] is not None  # asked for by NEEDS
            nontarget_sum = formed[0][: call.count]
            target_coef *= _slopes(call, rows)
        else:  # what earlier calls keep, or copies of the valid rows, left too little workspace
            chosen = plan.make(call.problem, 0, "recompute")
            state, argmax = products.statistics(call.head, rows, track, chosen)
    outputs = linear_stats.outputs(call, state, argmax, track)
    return (*outputs, call.scatter(target_coef, accum), nontarget_sum)


def _slopes(call: head_call.Call, target: Tensor) -> Tensor | float:
    """∂z/∂x at every row's target; from products in float64 under a softcap.

    Next to the cap it is what is left of 1 - 1: the rounding of a float32 logit would show.
    """
    head = call.head
    if not head.transform.softcap:
        return head.transform.derivative(target)
    slope = torch.empty(len(target), dtype=torch.float64, device=target.device)
    budget = call.problem.workspace // 32
    for part, target_rows in _target_rows(head.weight, target, call.dtype, budget):
        x = (head.hidden[part].double() * target_rows.double()).sum(1)
        bias = None if head.bias is None else head.bias[target[part]]
        slope[part] = head.transform.derivative(head.transform.apply(x, bias))
    return slope


def _target_rows(
    weight: Tensor, target: Tensor, dtype: torch.dtype, elements: int
) -> Iterator[tuple[slice, Tensor]]:
    """Head rows of the targets in the dtype of the products, at most `elements` at a time."""
    if weight.device.type == "cpu":
        elements = min(elements, GATHERED)
    step = max(elements // weight.shape[1], 1)
    for part in slices(0, len(target), step):
        yield part, weight.index_select(0, target[part]).to(dtype)


def _frozen_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, track, _ = rest
    out = linear_stats.outputs_fake(hidden, head_call.Options(*options).dtype, track)
    return (*out, torch.empty_like(out.norm), hidden.new_empty((0, hidden.shape[1])))


def _d_hidden(
    nontarget_sum: Tensor,
    weight: Tensor,
    target: Tensor,
    target_coef: Tensor,  # (2, N): how much of the target's head row a unit of a and of c takes
    upstream: linear_stats.Upstream,
    options: head_call.Options,
) -> Tensor:
    """The gradient of hidden, in place of `nontarget_sum` where every row is valid."""
    a, c, *_ = upstream.terms(torch.zeros_like(target_coef[0]))
    columns = (target, *target_coef, a, c)
    rows, count = None, len(nontarget_sum)
    if count != len(target):
        # The valid ones first: `nonzero` would wait for the device to count them again.
        rows = (target == options.ignore_index).byte().argsort(stable=True)[:count]
        columns = tuple(value.index_select(0, rows) for value in columns)
    ids, per_logprob, per_lse, a, c = columns
    target_rows, rest = a * per_logprob + c * per_lse, c - a
    no_upstream = (a == 0) & (c == 0)  # there 0 times a NaN is 0, as with every schedule
    for part, head_rows in _target_rows(weight, ids, options.dtype, options.workspace // 16):
        total = head_rows.to(rest.dtype) * target_rows[part, None]
        total.addcmul_(nontarget_sum[part].to(rest.dtype), rest[part, None])
        nontarget_sum[part] = total.masked_fill_(no_upstream[part, None], 0)
    if rows is None:
        return nontarget_sum
    return nontarget_sum.new_zeros((len(target), nontarget_sum.shape[1])).index_copy_(
        0, rows, nontarget_sum
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *options, track, ctx.active = inputs
    *statistics, target_coef, nontarget_sum = output
    out = linear_stats.Statistics(*statistics)
    ctx.mark_non_differentiable(
        *(getattr(out, name) for name in out._fields if name not in DIFFERENTIABLE),
        target_coef, nontarget_sum,
    )  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, out.norm, target_coef)
    ctx.options, ctx.track = head_call.Options(*options), track
    # Not saved: consumed by the first backward, in place; a second one forms the products again.
    saved = head_call.SavedBuffers((nontarget_sum,)) if nontarget_sum.shape[0] else None
    ctx.nontarget_sum = saved


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * (len(ctx.options) + 5)
    upstream = linear_stats.asked_upstream(ctx.track, grads)
    if all(gradient is None for gradient in upstream):
        return (None, *nothing)
    hidden, weight, bias, target, norm, target_coef = ctx.saved_tensors
    if ctx.nontarget_sum is None or torch.is_grad_enabled() or sync_free.on():
        unused = norm.new_empty(0)  # entropy
        d_hidden, *_ = torch.ops.ift_kernels.linear_stats_backward(
            hidden, weight, bias, target, norm, unused, *upstream, *ctx.options,
            [*NEEDS, False, False, False], ctx.active, None, None, None,
        )  # fmt: skip
    else:
        saved, ctx.nontarget_sum = ctx.nontarget_sum, None
        saved.release()
        (nontarget_sum,) = saved.tensors
        d_hidden = _d_hidden(nontarget_sum, weight, target, target_coef, upstream, ctx.options)
    return (d_hidden, *nothing)


library.register(
    f"linear_frozen({linear_stats.HEAD}, {linear_stats.OPTIONS}, int track, float[] active)"
    f" -> ({linear_stats.OUTPUTS}, Tensor target_coef, Tensor nontarget_sum)",
    _frozen,
    _frozen_fake,
    _autograd,
    _setup,
)
