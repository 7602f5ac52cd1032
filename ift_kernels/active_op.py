"""The operators behind ``gradient="active"``: `linear_stats` with an active-set backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ift_kernels import (
    active,
    active_backward,
    engine,
    head_call,
    linear_ops,
    operators,
    plan,
    syncfree,
)
from ift_kernels.active_set import ActiveSet, ActiveSetStats, recording
from ift_kernels.backends import reference as ref
from ift_kernels.sums import wide_dtype

_SET = "float threshold, int block, int tail_tile"
_FORMED = "Tensor marks, Tensor tails, Tensor layout, Tensor{} store"
_BACKWARD = (
    f"{linear_ops.HEAD}, Tensor norm, Tensor entropy, {linear_ops.UPSTREAM}, {linear_ops.OPTIONS},"
    f" bool[] needs, {_SET}"
)


def _nothing(like: Tensor, dtype: torch.dtype) -> active.Formed:
    """No set at all."""
    return active.Formed(
        like.new_empty((0, 0), dtype=torch.uint8),
        like.new_empty((4, 0, 0), dtype=wide_dtype(dtype)),
        torch.empty((0, 3), dtype=torch.int64, device="cpu"),
        like.new_empty(0, dtype=dtype),
    )


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, track, needs, keep, threshold, block, tail_tile = rest
    valid = target != options[0]
    head_call.check_targets(target, valid, weight.shape[0])
    call = head_call.Call(hidden, weight, bias, valid, tuple(options), tuple(needs))
    chosen = ActiveSet(threshold, block, tail_tile, "active")
    at = active.tiling(call.problem, chosen, plan.ledger.held)
    rows, formed = call.select(target), _nothing(hidden, call.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if at is not None and keep and _own_schedule(call.head, at):
            size = call.problem.rows, weight.shape[0]
            at = replace(at, rows=size[0], columns=size[1], block=chosen.block)
            state, argmax, formed = call.head.backend.active_form(call.head, rows, track, at)
        elif at is not None and keep and not syncfree.on():  # this one asks how many are active
            state, argmax, formed = active.form(call.head, rows, track, at)
        else:
            exact = plan.make(call.problem, plan.ledger.held, "recompute")
            state, argmax = engine.statistics(call.head, rows, track, exact)
    report = recording()
    if report is not None:
        report.append(_stats_of(call.head, state, at, formed))
    return (*linear_ops.outputs(call, state, argmax, track), *formed)


def _own_schedule(head: engine.Head, at: active.Tiling) -> bool:
    """Whether the backend brings a schedule of its own for the active set, and it can serve."""
    serves = getattr(head.backend, "active_serves", None)
    return serves is not None and bool(serves(head, at))


def _made_by_own_schedule(formed: active.Formed) -> bool:
    return len(formed.layout) > 1 and formed.layout[1].tolist()[1] < 0


def _stats_of(
    head: engine.Head, state: Tensor, at: active.Tiling | None, formed: active.Formed
) -> ActiveSetStats:
    kinds = formed.layout[1:, 0].tolist()
    tiles = len(kinds) or (0 if at is None else len(active.tiles(head, at)))
    share, mean, most = (float("nan"),) * 3
    if formed.marks.numel() and active.AGAIN not in kinds:
        weights = [
            1.0 if kind == active.DENSE else formed.marks[at.blocks(rows), columns].double().mean()
            for kind, (rows, columns) in zip(kinds, active.tiles(head, at), strict=True)
        ] if at else []  # fmt: skip
        sizes = [
            (rows.stop - rows.start) * (columns.stop - columns.start)
            for rows, columns in active.tiles(head, at)
        ] if at else []  # fmt: skip
        share = float(sum(w * s for w, s in zip(weights, sizes, strict=True)) / sum(sizes))
        top, total = state[ref.MAX], state[ref.SUM]
        scale = (formed.tails[active.REFERENCE].double() - top).exp() / total
        mass = formed.tails[active.MASS]
        tail = torch.where(mass == 0, 0.0, scale * mass).sum(0)
        mean, most = float(tail.mean()), float(tail.max())
    return ActiveSetStats(
        share, mean, most, formed.store.numel() * formed.store.element_size(), tiles,
        kinds.count(active.DENSE), kinds.count(active.AGAIN) if kinds else tiles,
    )  # fmt: skip


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, track, _, _, _, _, _ = rest
    shapes = linear_ops.outputs_fake(hidden, options[-1], track)
    return (*shapes, *_nothing(hidden, options[-1]))


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    norm: Tensor,
    entropy: Tensor,
    d_logprob: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    d_mean: Tensor | None,
    *rest: Any,
    formed: active.Formed | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, needs, threshold, block, tail_tile = rest
    upstream = d_logprob, d_lse, d_entropy, d_mean
    coef = linear_ops.row_coefficients(norm, entropy, weight.shape[0], *upstream)
    count = valid = target != options[0]
    teaches = (coef != 0).any(0)  # a NaN upstream is not 0 and so stays in
    if formed is None:
        count = valid & teaches  # nothing is kept, so other rows need not be looked at
    elif syncfree.on() or bool((valid & ~teaches).any()):
        hidden = hidden.masked_fill((valid & ~teaches)[:, None], 0)  # 0 times a NaN would not be 0
    call = head_call.Call(hidden, weight, bias, count, tuple(options), tuple(needs))
    if syncfree.on():
        coef = coef.masked_fill(~(valid & teaches), 0)
    chosen = ActiveSet(threshold, block, tail_tile, "active")
    at = active.tiling(call.problem, chosen)
    row_gradient = engine.RowGradient(call.select(target), call.select(norm), call.select(coef))
    arguments = call.head, row_gradient, tuple(needs), hidden.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        # One schedule cannot go on from what the other left.
        own = at is not None and _own_schedule(call.head, at)
        own = own and (formed is None or _made_by_own_schedule(formed))
        if at is None or call.problem.rows == 0 or (syncfree.on() and not own):
            exact = plan.make(call.problem, 0, "recompute")
            results = engine.gradients(*arguments, exact)
        elif own:
            formed = _nothing(hidden, call.dtype) if formed is None else formed
            results = call.head.backend.active_gradients(*arguments, at, formed, options[4])
        else:
            if formed is None:
                layout = active.nothing_kept(at, len(active.tiles(call.head, at)))
                formed = _nothing(hidden, call.dtype)._replace(layout=layout)
            results = active_backward.gradients(*arguments, at, formed)
    return linear_ops.gradient_outputs(call, results, bias)


def _backward_kept(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(*arguments[:-4], formed=active.Formed(*arguments[-4:]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *options = inputs
    ctx.mark_non_differentiable(*(output[i] for i in (3, 4, 5, 6, *range(8, 13))))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, output[8], output[2])
    ctx.options, ctx.track, ctx.set = options[:6], options[6], options[9:]
    ctx.sync_free = syncfree.on()
    # Not saved: consumed by the first backward, in place; a second one forms everything again.
    ctx.formed = head_call.Held(output[9:]) if output[11].shape[0] else None


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * 13
    upstream = linear_ops.asked_upstream(ctx.track, grads)
    if all(gradient is None for gradient in upstream):
        return (None, None, None, *nothing)
    needs = list(ctx.needs_input_grad[:3])
    arguments = (*ctx.saved_tensors, *upstream, *ctx.options, needs, *ctx.set)
    same = ctx.sync_free == syncfree.on()  # as for `linear_stats`
    if ctx.formed is None or not same or torch.is_grad_enabled():
        results = torch.ops.ift_kernels.linear_active_backward(*arguments)
    else:
        held, ctx.formed = ctx.formed, None
        results = torch.ops.ift_kernels.linear_active_backward_kept(*arguments, *held.tensors)
        held.release()
    return (*(g if need else None for g, need in zip(results, needs, strict=True)), *nothing)


operators.register(
    f"linear_active({linear_ops.HEAD}, {linear_ops.OPTIONS}, int track, bool[] needs, bool keep,"
    f" {_SET}) -> ({linear_ops.STATS}, Tensor norm, {_FORMED.format('')})",
    _forward,
    _forward_fake,
    _autograd,
    _setup,
)
operators.register(
    f"linear_active_backward({_BACKWARD}) -> ({linear_ops.GRADIENTS})",
    _backward,
    linear_ops.backward_fake,
    operators.no_second_derivative("linear_logprobs"),
)
# The same with a set formed in forward, which it consumes.
operators.register(
    f"linear_active_backward_kept({_BACKWARD}, {_FORMED.format('(a!)')})"
    f" -> ({linear_ops.GRADIENTS})",
    _backward_kept,
    linear_ops.backward_fake,
)
