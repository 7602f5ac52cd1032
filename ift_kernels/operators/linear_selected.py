"""The operator behind `linear_selected`: products of some ids of every row, and the rest's lse.

After its product a tile's selected columns are moved out, so that the statistics are those of the
rest; the gradients of a tile get theirs put in, before the products of dh and dW. What is made of
both is plain torch on (N, K).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.backends import contract
from ift_kernels.common import checks, sync_free
from ift_kernels.operators import head_call, library, linear_stats
from ift_kernels.operators.head_call import Call, Options, ValidRows
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import Head

ARGUMENTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor valid"


def check_ids(ids: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """(N,) bool: rows with an id outside the vocabulary, or with one that occurs twice.

    Refused as `head_call.check_targets` does; elsewhere such a row becomes NaN.
    """
    there = ids != ignore_index
    head_call.check_targets(ids.flatten(), there.flatten(), vocabulary, "ids")
    ordered = ids.masked_fill(~there, -1).sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    on_cpu = ids.device.type == "cpu"
    if twice.numel() and (on_cpu or checks.debugging()):
        expected = "ids: expected every id of a token once"
        if not on_cpu and sync_free.on():
            torch._assert_async(~twice.any(), expected)
        elif bool(twice.any()):
            row, place = twice.nonzero()[0].tolist()
            raise ValueError(f"{expected}, got {int(ordered[row, place])} twice at token {row}")
    return twice.any(1) | (there & ((ids < 0) | (ids >= vocabulary))).any(1)


def ascending(ids: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Ids (N, K) as of `contract.Selected`, and where each was."""
    return ids.masked_fill(ids == ignore_index, -1).sort(1)


def lse_of_rest(head: Head, state: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (N,) of the columns that are not selected, float64, and `norm` (2, N) of it."""
    top, total = state[contract.MAX], state[contract.SUM]
    assert head.selected is not None
    if head.transform.bounded and not head.masks_selected:
        # What is left in place of the selected columns counts, each at most as much as any other:
        # together at most as much as the rest.
        taken = (head.selected.ids >= 0).sum(1)
        total = total - taken * (_lowest_logit(head) - top).exp()
    norm = torch.stack([top, total.log()])
    return norm.sum(0), norm


def _lowest_logit(head: Head) -> Tensor:
    """The logit that the backend makes of the lowest product."""
    x = head.buffer(1, 1).fill_(head.transform.lowest_product)
    state = contract.new_state(1, x.device)
    target = torch.full((1,), -1, dtype=torch.int64, device=x.device)
    head.backend.stats_update(contract.Chunk(x, None, head.transform), target, state, 0)
    return state.values[contract.MAX]


def _selected(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, valid: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *numbers, needs, schedule = rest
    options = Options(*numbers)
    wrong = check_ids(ids, options.ignore_index, weight.shape[0])
    ordered, order = ascending(ids, options.ignore_index)
    accum = accum_dtype(options.dtype)
    # NaN until its column comes; so an id outside the vocabulary stays one.
    values = torch.zeros(ids.shape, dtype=accum, device=ids.device)
    selected = contract.Selected(ordered, values.masked_fill_(ordered >= 0, torch.nan))
    rows = ValidRows.of(valid)
    call = Call(hidden, weight, bias, rows, options, tuple(needs), selected=selected)
    none = torch.full((call.problem.rows,), -1, dtype=torch.int64, device=ids.device)
    (state, _), kept = linear_stats.form_statistics(call, none, 0, schedule)
    rest_lse, norm = lse_of_rest(call.head, state)
    assert call.head.selected is not None
    found = call.scatter(call.head.selected.values.T, accum).T
    product = torch.empty_like(values).scatter_(1, order, found)
    return (
        product.masked_fill_(wrong[:, None], torch.nan),
        call.scatter(rest_lse, torch.float64),
        call.scatter(norm, accum),
        kept,
    )


def _selected_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, valid: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *numbers, _, _ = rest
    dtype, n = Options(*numbers).dtype, hidden.shape[0]
    return (
        hidden.new_empty(ids.shape, dtype=accum_dtype(dtype)),
        hidden.new_empty(n, dtype=torch.float64),
        hidden.new_empty((2, n), dtype=accum_dtype(dtype)),
        hidden.new_empty((0, 0), dtype=dtype),
    )


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    norm: Tensor,
    d_product: Tensor,
    d_rest: Tensor,
    *rest: Any,
    kept: Tensor | None = None,
) -> tuple[Tensor, ...]:
    *numbers, needs = rest
    options = Options(*numbers)
    # A rest without probability has no gradient, where 0 times an infinity would be NaN.
    d_rest = d_rest.to(norm.dtype).masked_fill(norm[0] == -torch.inf, 0)
    upstream = linear_stats.Upstream(lse=d_rest)
    coef = linear_stats.row_coefficients(norm, norm[0], weight.shape[0], upstream)
    ordered, order = ascending(ids, options.ignore_index)
    d_product = d_product.masked_fill((ids == options.ignore_index) | ~valid[:, None], 0)
    nonzero_grad_rows = valid & ((d_rest != 0) | (d_product != 0).any(1))
    none = torch.full((len(ids),), -1, dtype=torch.int64, device=ids.device)
    return linear_stats.form_gradients(
        (hidden, weight, bias), contract.RowGradient(none, norm, coef), valid, nonzero_grad_rows,
        options, tuple(needs), kept,
        selected=contract.Selected(ordered, d_product.to(norm.dtype).gather(1, order)),
    )  # fmt: skip


def _backward_kept(*args: Any) -> tuple[Tensor, ...]:
    return _backward(*args[:-1], kept=args[-1])


def _backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs = rest
    return linear_stats.gradients_fake(hidden, weight, bias, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, valid, *options, _, _ = inputs
    _, _, norm, kept = output
    ctx.mark_non_differentiable(norm, kept)
    ctx.set_materialize_grads(False)  # zeros as large as `kept` among them
    ctx.save_for_backward(hidden, weight, bias, ids, valid, norm)
    ctx.options, ctx.sync_free = options, sync_free.on()
    # Not saved: consumed by the first backward, in place; a second one recomputes.
    ctx.kept = head_call.SavedBuffers((kept,)) if kept.shape[0] else None


def _autograd(
    ctx: Any, d_product: Tensor | None, d_rest: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * (len(ctx.options) + 4)
    if d_product is None and d_rest is None:
        return (None, None, None, *nothing)
    saved_tensors = ctx.saved_tensors  # read once: a checkpoint allows no more
    *_, ids, valid, norm = saved_tensors
    if d_product is None:
        d_product = norm.new_zeros(ids.shape)
    if d_rest is None:
        d_rest = norm.new_zeros(valid.shape, dtype=torch.float64)
    needs = list(ctx.needs_input_grad[:3])
    args = (*saved_tensors, d_product, d_rest, *ctx.options, needs)
    # As of `linear_stats`.
    if ctx.kept is None or ctx.sync_free != sync_free.on() or torch.is_grad_enabled():
        results = torch.ops.ift_kernels.linear_selected_backward(*args)
    else:
        saved, ctx.kept = ctx.kept, None
        results = torch.ops.ift_kernels.linear_selected_backward_kept(*args, saved.tensors[0])
        saved.release()
    return (*(g if need else None for g, need in zip(results, needs, strict=True)), *nothing)


library.register(
    f"linear_selected({ARGUMENTS}, {linear_stats.OPTIONS}, bool[] needs, str schedule)"
    " -> (Tensor product, Tensor rest_lse, Tensor norm, Tensor kept)",
    _selected,
    _selected_fake,
    _autograd,
    _setup,
)
_BACKWARD = (
    f"{ARGUMENTS}, Tensor norm, Tensor d_product, Tensor d_rest, {linear_stats.OPTIONS},"
    " bool[] needs"
)
library.register(
    f"linear_selected_backward({_BACKWARD}) -> ({linear_stats.GRADIENTS})",
    _backward,
    _backward_fake,
    library.no_second_derivative("linear_selected_logprobs"),
)
library.register(
    f"linear_selected_backward_kept({_BACKWARD}, Tensor(a!) kept) -> ({linear_stats.GRADIENTS})",
    _backward_kept,
    lambda *args: _backward_fake(*args[:-1]),
)
