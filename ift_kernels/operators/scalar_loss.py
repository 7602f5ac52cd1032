"""The operator behind a scalar `linear_cross_entropy`: its gradients are formed in forward.

The loss is `factor` times the sum of
``(smoothing − 1)·logp − smoothing·(mean z − lse) + z_loss·lse²`` over the valid rows, so its
upstream gradients are known as soon as a row's statistics are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends import contract
from ift_kernels.operators import adapter, head_call, library, linear_stats
from ift_kernels.schedule import gradients, plan, products
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import Results


def _loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, factor: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, smoothing, z_loss, fp32_weight_sum, needs, numbers = rest[:-3]
    active = head_call.active_hidden(numbers)
    valid = target != options[0]
    head_call.check_targets(target, valid, weight.shape[0])
    valid_rows = head_call.ValidRows.of(valid)
    head_needs = adapter.head_needs(needs)
    call = head_call.Call(
        hidden, weight, bias, valid_rows, head_call.Options(*options), head_needs,
        grads_in_forward=True, active=active, fp32_weight_sum=fp32_weight_sum,
        adapter=adapter.AdapterTensors(*rest[-3:]), adapter_needs=adapter.adapter_needs(needs),
    )  # fmt: skip
    chosen = plan.make(call.problem, plan.ledger.reserved, "forward")
    # Gradients that earlier calls hold, or too few rows a block: backward recomputes instead.
    # So it does in sync-free mode: rows that are not valid are still there.
    grads_in_forward = chosen.schedule == "forward" and call.valid_mask is None
    vocabulary, dtype = weight.shape[0], accum_dtype(call.dtype)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    norms: list[Tensor] = []

    # Of gradients that are rounded to 16 bits, the common factor comes after: see `common_factor`.
    after = factor.to(dtype) if call.head.rounds_gradients else None
    inside = factor if after is None else torch.ones_like(factor)
    rows, done = call.select(target), 0

    def coefficients(state: Tensor, argmax: Tensor) -> contract.RowGradient:
        nonlocal done
        row = linear_stats.row_values(state, argmax, vocabulary, track)
        loss = z_loss * row.lse.square() - (1 - smoothing) * row.logprob
        if smoothing:
            loss = loss - smoothing * row.mean_logit
        here = slice(done, done := done + len(argmax))
        total.add_(call.drop(loss, here).sum())
        norms.append(row.norm.to(dtype))
        upstream = loss_upstream(norms[-1], inside, smoothing, z_loss)
        coef = linear_stats.row_coefficients(norms[-1], row.entropy, vocabulary, upstream)
        return contract.RowGradient(rows, norms[-1], call.drop(coef, here))

    results: Results = (None, None, None)
    track = contract.TRACK_MEAN if smoothing else 0
    with torch.autocast(hidden.device.type, enabled=False):
        if grads_in_forward:
            call.add_adapter_sums()
            results = gradients.in_forward(
                call.head, rows, coefficients, head_needs, hidden.dtype, chosen, track, active,
                after,
            )  # fmt: skip
        else:
            chosen = plan.make(call.problem, 0, "recompute")
            coefficients(*products.statistics(call.head, rows, track, chosen))
    norm = torch.cat(norms, 1) if norms else hidden.new_empty((2, 0), dtype=dtype)
    return (
        (total * factor).to(dtype),
        call.scatter(norm, dtype),
        *linear_stats.gradient_outputs(call, results, bias),
        *call.adapter_gradients(),
    )


def loss_upstream(
    norm: Tensor, factor: Tensor, smoothing: float, z_loss: float
) -> linear_stats.Upstream:
    """Upstream gradients that the loss sends to the statistics of each row."""
    lse = norm.sum(0)
    each = factor.to(lse.dtype).expand_as(lse)
    return linear_stats.Upstream(
        (smoothing - 1) * each, 2 * z_loss * lse * each, None, -smoothing * each
    )


def _loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, factor: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, _, _, _, needs, _ = rest[:-3]
    dtype = accum_dtype(head_call.Options(*options).dtype)
    gradients = linear_stats.gradients_fake(hidden, weight, bias, needs)
    norm = hidden.new_empty((2, hidden.shape[0]), dtype=dtype)
    of_adapter = adapter.gradients_fake(hidden, rest[-3:], needs)
    return hidden.new_empty((), dtype=dtype), norm, *gradients, *of_adapter


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, factor, *options = inputs[:-3]
    _, norm, *gradients = output
    ctx.mark_non_differentiable(norm, *gradients)
    ctx.set_materialize_grads(False)  # else zeros as large as the gradients among the outputs
    ctx.save_for_backward(hidden, weight, bias, target, factor, norm, *inputs[-3:])
    ctx.options = options
    formed = any(gradient.numel() for gradient in gradients)
    ctx.gradients = head_call.SavedBuffers(tuple(gradients)) if formed else None


def _loss_autograd(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * (len(ctx.options) + 2)
    if upstream is None:
        return (None, None, None, *nothing, None, None, None)
    hidden, weight, bias, target, factor, norm, *of_adapter = ctx.saved_tensors
    needs = adapter.needed(ctx)
    if ctx.gradients is None or torch.is_grad_enabled():
        *options, smoothing, z_loss, _, _, active = ctx.options
        rows = loss_upstream(norm, factor * upstream, smoothing, z_loss)
        results = torch.ops.ift_kernels.linear_stats_backward(
            hidden, weight, bias, target, norm, norm[0], *rows, *options, needs, active,
            *of_adapter,
        )  # fmt: skip
    else:
        saved, ctx.gradients = ctx.gradients, None
        results = saved.gradients(upstream, target != ctx.options[0], of_rows=(0, 3))
    return adapter.input_gradients(results, needs, nothing)


library.register(
    f"linear_loss({linear_stats.HEAD}, Tensor factor, {linear_stats.OPTIONS}, float smoothing,"
    f" float z_loss, bool fp32_weight_sum, bool[] needs, float[] active, {adapter.SCHEMA})"
    f" -> (Tensor loss, Tensor norm, {linear_stats.GRADIENTS}, {adapter.GRADIENTS})",
    _loss,
    _loss_fake,
    _loss_autograd,
    _loss_setup,
)
