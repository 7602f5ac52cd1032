"""The operators behind `linear`: what torch's dispatcher, autograd and compiler see.

Read downward: schemas, then `linear_stats` forward and backward over `schedule`, and its autograd
formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ift_kernels.backends import contract
from ift_kernels.common import sync_free
from ift_kernels.operators import adapter as adapters
from ift_kernels.operators import library
from ift_kernels.operators.adapter import AdapterTensors, Needs, adapter_needs, head_needs
from ift_kernels.operators.head_call import (
    Call,
    Options,
    SavedBuffers,
    ValidRows,
    active_hidden,
    check_targets,
    with_filled_rows,
)
from ift_kernels.schedule import gradients, plan, products
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.active import ActiveHidden
from ift_kernels.schedule.head import Results

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
OPTIONS = (
    "int ignore_index, float scale, float softcap, float temperature, int workspace,"
    " ScalarType dtype, bool deterministic"
)
GRADIENTS = "Tensor d_hidden, Tensor d_weight, Tensor d_bias"


class Statistics(NamedTuple):
    """Every statistic of `contract.STATISTICS`, (N,), empty where not asked for, and `norm`."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    argmax_logprob: Tensor
    second_logprob: Tensor
    sum_sq: Tensor
    mean_logit: Tensor  # less lse
    target_logit: Tensor
    norm: Tensor  # (2, N): the largest logit, and lse less it


class Upstream(NamedTuple):
    """Gradients that come from above, (N,), of the differentiable statistics."""

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    target_logit: Tensor | None = None

    def terms(self, zero: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of the first four: the target's logit is logprob + lse. `zero` where None."""
        *four, e = self
        a, c, b, d = (zero if gradient is None else gradient for gradient in four)
        return (a, c, b, d) if e is None else (a + e, c + e, b, d)


OUTPUTS: str = ", ".join(f"Tensor {name}" for name in Statistics._fields)
_UPSTREAM = ", ".join(f"Tensor? d_{name}" for name in Upstream._fields)
_BACKWARD = (
    f"{HEAD}, Tensor norm, Tensor entropy, {_UPSTREAM}, {OPTIONS}, bool[] needs, float[] active,"
    f" {adapters.SCHEMA}"
)
_FIXED = [s.name for s in contract.STATISTICS if not s.differentiable] + ["norm"]


def row_values(state: Tensor, argmax: Tensor, vocabulary: int, track: int) -> Statistics:
    """The statistics of rows, from the final running state; float64.

    What `track` does not ask for is empty: with few tokens each operation takes noticeable time.
    The target's term comes to the sums here: 1 + Σ would lose what a nearly certain token leaves
    to all others, log1p does not.
    """
    top, target_logit = state[contract.MAX], state[contract.TARGET]
    gap = target_logit - top
    # e^gap − 1, with 0 for e^gap where gap is NaN: no column was left out, or the sum is NaN or 0.
    less_one = gap.expm1().nan_to_num(-1.0)
    log_sum = (state[contract.SUM] + less_one).log1p()
    if track & (contract.TRACK_ENTROPY | contract.TRACK_SQ):
        e = less_one + 1.0
        total, e_gap = state[contract.SUM] + e, (e * gap).nan_to_num(0.0)  # 0 times an infinity
    values: tuple[Callable[[], Tensor], ...] = (
        lambda: gap - log_sum,
        lambda: top + log_sum,
        lambda: log_sum - (state[contract.E_Z] + e_gap) / total,
        lambda: argmax,
        lambda: (top - top) - log_sum,  # NaN, not +inf, where every token is masked out
        lambda: (state[contract.SECOND] - top) - log_sum,
        lambda: (state[contract.E_SQ] + e.square()) / total.square(),
        # Relative to lse while still in float64: a large common logit would cost digits later.
        lambda: (state[contract.Z_SUM] / vocabulary - top) - log_sum,
        lambda: target_logit,
        lambda: torch.stack([top, log_sum]),
    )
    pairs = zip(values, tracked(track), strict=True)
    return Statistics(*(value() if asked else state.new_empty(0) for value, asked in pairs))


def row_coefficients(norm: Tensor, entropy: Tensor, vocabulary: int, upstream: Upstream) -> Tensor:
    """`coef` (4, N) of `dlogits_` from upstream gradients.

    With a, b, c, d those of logprob, entropy, lse and mean_logit (docs/mathematics.md),
    dz_j = a·(1[j = target] − p_j) + p_j·(c − d − b·(log p_j + H)) + d/V.
    """
    a, c, b, d = upstream.terms(torch.zeros_like(norm[0]))
    c_prob = c - d
    if upstream.entropy is not None:  # 0 times a NaN is 0: a row without upstream sends none
        c_prob = c_prob - (b * entropy).masked_fill(b == 0, 0)
    return torch.stack([a, c_prob, -b, d / vocabulary]).to(norm.dtype)


# --- linear_stats --------------------------------------------------------------------------------


def tracked(track: int) -> list[bool]:
    """Which of `Statistics` are asked for."""
    return [not s.track or bool(track & s.track) for s in contract.STATISTICS] + [True]


def outputs(call: Call, state: Tensor, argmax: Tensor, track: int) -> Statistics:
    """The statistics of all rows, 0 where not valid, empty where not asked for."""
    values = row_values(state, argmax, call.head.vocabulary, track)
    dtype = accum_dtype(call.dtype)
    return Statistics(
        *(
            call.scatter(v, v.dtype if v.dtype == torch.int64 else dtype) if asked else v.to(dtype)
            for v, asked in zip(values, tracked(track), strict=True)
        )
    )


def outputs_fake(hidden: Tensor, compute: torch.dtype, track: int) -> Statistics:
    """Shapes of `outputs` for products in the dtype `compute`."""
    n, dtype = hidden.shape[0], accum_dtype(compute)
    out = Statistics(*(hidden.new_empty(n if each else 0, dtype=dtype) for each in tracked(track)))
    ids = torch.int64 if track & contract.TRACK_ARGMAX else dtype
    return out._replace(argmax=out.argmax.to(ids), norm=hidden.new_empty((2, n), dtype=dtype))


def gradient_outputs(
    call: Call, results: Results, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward operator returns: all rows, empty where no gradient is wanted."""
    d_hidden, d_weight, d_bias = results
    empty = call.head.hidden.new_empty(0)
    return (
        empty if d_hidden is None else call.scatter_hidden(d_hidden),
        empty.clone() if d_weight is None else d_weight,
        empty.clone() if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def asked_upstream(track: int, grads: tuple[Tensor | None, ...]) -> Upstream:
    """Upstream gradients of what was asked for; those of empty outputs are empty too."""
    asked = zip(Statistics._fields, tracked(track), grads, strict=False)
    of = {name: gradient if yes else None for name, yes, gradient in asked}
    return Upstream(*(of[name] for name in Upstream._fields))


def _stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, track, needs, schedule, numbers = rest[:-3]
    valid = target != options[0]
    check_targets(target, valid, weight.shape[0])
    active = active_hidden(numbers)
    rows = ValidRows.of(valid)
    call = Call(
        hidden, weight, bias, rows, Options(*options), head_needs(needs), active=active,
        adapter=AdapterTensors(*rest[-3:]), adapter_needs=adapter_needs(needs),
    )  # fmt: skip
    (state, argmax), kept = form_statistics(call, call.select(target), track, schedule)
    return (*outputs(call, state, argmax, track), kept)


def form_statistics(
    call: Call, target: Tensor, track: int, schedule: str
) -> tuple[contract.RowState, Tensor]:
    """The running state after the whole vocabulary, and the products kept until backward."""
    chosen = plan.make(call.problem, plan.ledger.reserved, schedule or None)
    kept_rows = call.problem.rows if chosen.keep_columns else 0
    kept = call.head.buffer(kept_rows, chosen.keep_columns)
    with torch.autocast(target.device.type, enabled=False):
        state = products.statistics(
            call.head, target, track, chosen, kept if chosen.keep_columns else None,
            last=not call.problem.any_gradient,
        )  # fmt: skip
    return state, kept[: call.count]


def _stats_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, track, _, _, _ = rest[:-3]
    dtype = Options(*options).dtype
    out = outputs_fake(hidden, dtype, track)
    return (*out, hidden.new_empty((0, 0), dtype=dtype))


def _backward_rows(
    valid: Tensor, nonzero: Tensor, kept: Tensor | None
) -> tuple[ValidRows, bool, bool]:
    """The rows of a backward, whether they are those of `kept`, and whether all are `nonzero`.

    Those with an upstream gradient; all valid ones where `kept` has two of their three products.
    Waits for the device once: how many rows are valid is known from `kept`.
    """
    if sync_free.on():
        return ValidRows(nonzero if kept is None else valid), kept is not None, False
    if kept is None:
        return ValidRows.of(nonzero), False, True
    found, count = torch.cat([valid, nonzero]).nonzero()[:, 0], kept.shape[0]
    ids, of_nonzero = found[:count], found[count:] - len(valid)
    # Three products on these rows alone cost less than two on all.
    if 3 * len(of_nonzero) < 2 * count:
        return ValidRows.among(of_nonzero, len(valid)), False, True
    return ValidRows.among(ids, len(valid)), True, len(of_nonzero) == count


def _stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    norm: Tensor,
    entropy: Tensor,
    d_logprob: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    d_mean_logit: Tensor | None,
    d_target_logit: Tensor | None,
    *rest: Any,
    kept: Tensor | None = None,
) -> tuple[Tensor, ...]:
    *options, needs, numbers = rest[:-3]
    upstream = Upstream(d_logprob, d_lse, d_entropy, d_mean_logit, d_target_logit)
    coef = row_coefficients(norm, entropy, weight.shape[0], upstream)
    valid = target != options[0]
    # Rows without upstream gradient send none. A NaN upstream is not 0 and so stays in.
    nonzero_grad_rows = valid & (coef != 0).any(0)
    return form_gradients(
        (hidden, weight, bias), contract.RowGradient(target, norm, coef), valid, nonzero_grad_rows,
        Options(*options), head_needs(needs), kept, active_hidden(numbers),
        adapter=AdapterTensors(*rest[-3:]), adapter_needs=adapter_needs(needs),
    )  # fmt: skip


def form_gradients(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    row_gradient: contract.RowGradient,
    valid: Tensor,
    nonzero_grad_rows: Tensor,
    options: Options,
    needs: Needs,
    kept: Tensor | None,
    active: ActiveHidden | None = None,
    selected: contract.Selected | None = None,
    adapter: AdapterTensors | None = None,
    adapter_needs: Needs = (False, False, False),
) -> tuple[Tensor, ...]:
    """What a backward operator returns, given all rows; `kept` products are consumed.

    With an `adapter`, given or not, its gradients are returned too.
    """
    (hidden, weight, bias), (target, norm, coef) = tensors, row_gradient
    kept_bytes = 0 if kept is None else kept.numel() * kept.element_size()  # until backward ends
    rows, of_kept, all_nonzero = _backward_rows(valid, nonzero_grad_rows, kept)
    if rows.mask is not None:
        coef = coef.masked_fill(~nonzero_grad_rows, 0)
    if not of_kept:
        kept = None
    elif not all_nonzero:
        # All rows, with hidden 0 where there is no upstream gradient: 0 times a NaN is NaN.
        without = (valid & ~nonzero_grad_rows)[:, None]
        hidden = hidden.masked_fill(without, 0)
        if adapter is not None and adapter.low_rank_hidden is not None:
            masked = adapter.low_rank_hidden.masked_fill(without, 0)
            adapter = adapter._replace(low_rank_hidden=masked)
    call = Call(
        hidden, weight, bias, rows, options, needs, active=active, selected=selected,
        adapter=adapter, adapter_needs=adapter_needs,
    )  # fmt: skip
    call.add_adapter_sums()
    kept = None if kept is None else with_filled_rows(kept, call.problem.rows)
    # Of the same problem, so that with `kept` beside it everything fits as forward has planned.
    chosen = plan.make(call.problem, 0, "recompute", kept_bytes)
    with torch.autocast(hidden.device.type, enabled=False):
        results = gradients.in_backward(
            call.head,
            contract.RowGradient(call.select(target), call.select(norm), call.select(coef)),
            needs,
            hidden.dtype,
            chosen,
            kept,
            active,
        )
    outputs = gradient_outputs(call, results, bias)
    return outputs if adapter is None else (*outputs, *call.adapter_gradients())


def _stats_backward_kept(*args: Any) -> tuple[Tensor, ...]:
    return _stats_backward(*args[:-1], kept=args[-1])


def gradients_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of the gradients that are asked for."""
    return (
        hidden.new_empty(hidden.shape) if needs[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else hidden.new_empty(0),
        bias.new_empty(bias.shape) if needs[2] and bias is not None else hidden.new_empty(0),
    )


def backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Shapes of what a backward operator returns, from its arguments."""
    *_, needs, _ = rest[:-3]
    return (
        *gradients_fake(hidden, weight, bias, needs),
        *adapters.gradients_fake(hidden, rest[-3:], needs),
    )


def _stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *options, ctx.track, _, _, ctx.active = inputs[:-3]
    *statistics, kept = output
    out = Statistics(*statistics)
    ctx.mark_non_differentiable(*(getattr(out, name) for name in _FIXED), kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, out.norm, out.entropy, *inputs[-3:])
    ctx.options, ctx.sync_free = options, sync_free.on()
    # Not saved: consumed by the first backward, in place; a second one recomputes.
    ctx.kept = SavedBuffers((kept,)) if kept.shape[0] else None


def _stats_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * (len(ctx.options) + 5)
    upstream = asked_upstream(ctx.track, grads)
    if all(gradient is None for gradient in upstream):
        return (None, None, None, *nothing, None, None, None)
    needs = adapters.needed(ctx)
    *tensors, u, b, scale = ctx.saved_tensors
    args = (*tensors, *upstream, *ctx.options, needs, ctx.active, u, b, scale)
    # Kept products have other rows if only one of forward and backward is sync-free. And with
    # create_graph the plain operator refuses clearly.
    same = ctx.sync_free == sync_free.on()
    if ctx.kept is None or not same or torch.is_grad_enabled():
        results = torch.ops.ift_kernels.linear_stats_backward(*args)
    else:
        saved, ctx.kept = ctx.kept, None
        results = torch.ops.ift_kernels.linear_stats_backward_kept(*args, saved.tensors[0])
        saved.release()
    return adapters.input_gradients(results, needs, nothing)


library.register(
    f"linear_stats({HEAD}, {OPTIONS}, int track, bool[] needs, str schedule, float[] active,"
    f" {adapters.SCHEMA}) -> ({OUTPUTS}, Tensor kept)",
    _stats,
    _stats_fake,
    _stats_autograd,
    _stats_setup,
)
library.register(
    f"linear_stats_backward({_BACKWARD}) -> ({GRADIENTS}, {adapters.GRADIENTS})",
    _stats_backward,
    backward_fake,
    library.no_second_derivative("linear_logprobs"),
)
# The same with products kept since forward, which it consumes.
library.register(
    f"linear_stats_backward_kept({_BACKWARD}, Tensor(a!) kept)"
    f" -> ({GRADIENTS}, {adapters.GRADIENTS})",
    _stats_backward_kept,
    lambda *args: backward_fake(*args[:-1]),
)
