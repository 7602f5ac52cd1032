"""Divergence of two linear heads' distributions, without the logits of either: distillation.

What is computed when is in `divergence_plan`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ift_kernels.backends.contract import KINDS
from ift_kernels.common import checks
from ift_kernels.common.transform import LogitTransform
from ift_kernels.operators import adapter as adapters
from ift_kernels.operators import head_call, library, linear_stats
from ift_kernels.schedule import plan
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.divergence_blocks import Divergence, Rows
from ift_kernels.schedule.head import Results


def linear_divergence(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (..., E)
    teacher_weight: Tensor,  # (V, E)
    *,
    mask: Tensor | None = None,  # (...)
    kind: str = "forward",
    beta: float = 0.5,
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., r), (V, r)
    column_scale: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Divergence between a student's and a teacher's next-token distributions.

    With z, y their logits, transformed as in `linear_logprobs`, equals::

        s, t = log_softmax(z / temperature, -1), log_softmax(y / temperature, -1)
        forward  (t.exp() * (t - s)).sum(-1)          # KL(teacher ‖ student)
        reverse  (s.exp() * (s - t)).sum(-1)          # KL(student ‖ teacher)
        m = logaddexp(s + log(1 - beta), t + log(beta))
        jsd      ((1 - beta) * s.exp() * (s - m) + beta * t.exp() * (t - m)).sum(-1)

    Gradients flow to the tensors of the student; the teacher is a constant. A scalar
    reduction forms them in forward, with two products less.

    Args:
        hidden, weight, bias, low_rank, column_scale: of the student, as in `linear_logprobs`.
        teacher_hidden, teacher_weight, teacher_bias: of the teacher, whose width may differ; the
            vocabulary must not.
        mask: (...) bool or 0/1: positions that count; None: all.
        kind: "forward", "reverse" or "jsd".
        beta: of "jsd", in (0, 1): the teacher's share of the mixture.
        logit_scale, softcap, teacher_logit_scale, teacher_softcap: of each model.
        temperature: of both distributions. No factor of its square is applied.
        reduction: "mean" over the positions that count, "sum", or "none".
        num_items: divisor of "mean", for means over several calls; with 0 the mean is 0.
        logits_dtype, workspace: as in `linear_logprobs`, the former of both models.

    Returns:
        float32 (float64 for float64) scalar, or per token, 0 off the mask.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit.
        RuntimeError: differentiated twice, in forward mode, or by torch.func.

    >>> h, w, teacher_h, teacher_w = (torch.randn(n, 8) for n in (4, 50, 4, 50))
    >>> s, t = (h @ w.T).log_softmax(-1), (teacher_h @ teacher_w.T).log_softmax(-1)
    >>> kl = linear_divergence(h, w, teacher_h, teacher_w, reduction="none")
    >>> torch.allclose(kl, (t.exp() * (t - s)).sum(-1), atol=1e-5)
    True
    """
    checks.one_of("kind", kind, KINDS)
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    if not 0 < checks.number("beta", beta) < 1:
        raise ValueError(f"beta: expected in (0, 1), got {beta}")
    checks.head_arguments(hidden, weight, bias)
    checks.head_arguments(teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    shape = hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape or teacher_hidden.device != hidden.device:
        raise ValueError(
            f"teacher_hidden: expected shape {(*tuple(shape), 'E')} on {hidden.device}, "
            f"got {tuple(teacher_hidden.shape)} on {teacher_hidden.device}"
        )
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher_weight: expected the student's vocabulary, V={weight.shape[0]}, "
            f"got {tuple(teacher_weight.shape)}"
        )
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: only divides reduction 'mean', got reduction {reduction!r}")
    if mask is None:
        valid = torch.ones(shape, dtype=torch.bool, device=hidden.device)
    else:
        valid = checks.as_bool_mask(mask, hidden[..., 0], "hidden without its last dimension")
    student = LogitTransform.checked(logit_scale, softcap, temperature)
    teacher = LogitTransform.checked(teacher_logit_scale, teacher_softcap, temperature, "teacher_")
    dtype = checks.compute_dtype(hidden, weight, logits_dtype)
    adapter = checks.adapter_arguments(hidden, weight, low_rank, column_scale, dtype)
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias, *adapter)
    ]
    factor: Tensor | None = None
    if reduction == "sum":
        factor = torch.ones((), dtype=torch.float64, device=hidden.device)
    elif reduction == "mean" and num_items is None:
        factor = valid.sum().clamp(min=1).double().reciprocal()
    elif reduction == "mean":
        factor = checks.reciprocal("num_items", num_items, hidden.device)
    # Gradients formed in forward are consumed once, which graphs and hooks cannot have.
    grads_in_forward = (
        factor is not None and dtype != torch.float16 and plan.forced_or_safe() != "recompute"
    )
    grads_in_forward = grads_in_forward and not head_call.gives_half(
        (hidden, weight, bias, *adapter), needs
    )
    each, total, *_ = torch.ops.ift_kernels.linear_divergence(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]), teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(), valid.reshape(-1).contiguous(),
        factor if grads_in_forward else None, KINDS.index(kind), beta, student.scale,
        student.softcap, teacher.scale, teacher.softcap, temperature,
        checks.workspace_bytes(workspace, hidden.device, dtype), dtype,
        checks.compute_dtype(teacher_hidden, teacher_weight, logits_dtype, "teacher_"), needs,
        *adapter,
    )  # fmt: skip
    if factor is not None:
        return cast(Tensor, total if grads_in_forward else each.sum() * factor.to(each.dtype))
    return cast(Tensor, each.view(shape))


# --- operators ------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight,"
    " Tensor? teacher_bias, Tensor valid"
)
_OPTIONS = (
    "int kind, float beta, float scale, float softcap, float teacher_scale, float teacher_softcap,"
    " float temperature, int workspace, ScalarType dtype, ScalarType teacher_dtype"
)


class _Call:
    """The heads of a call on the valid rows."""

    def __init__(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], needs: list[bool],
        adapter: tuple[Any, ...],
    ) -> None:  # fmt: skip
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, valid = tensors
        kind, beta, scale, softcap, t_scale, t_softcap, temperature, workspace, *dtypes = options
        self.bias, rows = bias, head_call.ValidRows.of(valid)
        student, teacher = (
            head_call.Call(
                *head, rows,
                head_call.Options(0, *transform, temperature, workspace, dtype, False),
                (False,) * 3, adapter=adapters.AdapterTensors(*of_head),
                adapter_needs=adapters.adapter_needs(needs),
            )
            for head, transform, dtype, of_head in (
                ((hidden, weight, bias), (scale, softcap), dtypes[0], adapter),
                ((teacher_hidden, teacher_weight, teacher_bias), (t_scale, t_softcap), dtypes[1],
                 (None,) * 3),
            )
        )  # fmt: skip
        self.student = student
        student.add_adapter_sums()
        budget = student.problem.workspace + teacher.problem.workspace - workspace
        budget = max(budget, workspace // 4)
        self.divergence = Divergence(
            (student.head, teacher.head), budget, KINDS[kind], beta,
            adapters.head_needs(needs), hidden.dtype,
        )  # fmt: skip


def _divergence(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, factor = arguments[:8]
    *options, needs = arguments[8:-3]
    hidden = tensors[0]
    grads_in_forward = factor is not None and any(needs)
    with torch.autocast(hidden.device.type, enabled=False):
        formed = needs if grads_in_forward else [False] * 6
        call = _Call(tuple(tensors), tuple(options), formed, arguments[-3:])
        n, dtype = call.student.head.hidden.shape[0], accum_dtype(call.student.dtype)
        upstream = None if factor is None else factor.to(dtype).repeat(n)
        given = Rows(
            torch.zeros(n, dtype=torch.float64, device=hidden.device),
            torch.zeros(n, dtype=torch.float64, device=hidden.device),
            torch.empty((2, 2, n), dtype=dtype, device=hidden.device),
            upstream,
        )
        results: Results = (None, None, None)
        if grads_in_forward:
            results = call.divergence.values_and_gradients(given)
        else:
            call.divergence.values(given)
    total = given.value.sum() * (1.0 if factor is None else factor)
    return (
        call.student.scatter(given.value, dtype),
        total.to(dtype),
        call.student.scatter(given.norm, dtype),
        call.student.scatter(given.centre, torch.float64),
        *linear_stats.gradient_outputs(call.student, results, call.bias),
        *call.student.adapter_gradients(),
    )


def _divergence_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, norm, centre, upstream = arguments[:10]
    *options, needs = arguments[10:-3]
    hidden, valid = tensors[0], tensors[-1]
    # A NaN upstream is not 0 and so stays in.
    tensors[-1] = valid & (upstream != 0)
    with torch.autocast(hidden.device.type, enabled=False):
        call = _Call(tuple(tensors), tuple(options), needs, arguments[-3:])
        norm, centre, upstream = (
            call.student.select(x).contiguous() for x in (norm, centre, upstream)
        )
        results = call.divergence.gradients(Rows(torch.empty_like(centre), centre, norm, upstream))
    of_head = linear_stats.gradient_outputs(call.student, results, call.bias)
    return *of_head, *call.student.adapter_gradients()


def _divergence_fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, *_, factor = arguments[:8]
    needs, dtype = arguments[-4], accum_dtype(arguments[-6])
    n = hidden.shape[0]
    grads_in_forward = factor is not None
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((2, 2, n), dtype=dtype),
        hidden.new_empty(n, dtype=torch.float64),
        *_backward_fake(
            hidden, weight, bias, [need and grads_in_forward for need in needs], *arguments[-3:]
        ),
    )


def _backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-4]
    of_adapter = adapters.gradients_fake(hidden, rest[-3:], needs)
    return *linear_stats.gradients_fake(hidden, weight, bias, needs), *of_adapter


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output[2:4], *inputs[-3:])
    ctx.options = inputs[8:-4]
    formed = any(gradient.numel() for gradient in output[4:])
    ctx.gradients = head_call.SavedBuffers(output[4:]) if formed else None


def _autograd(ctx: Any, d_each: Tensor | None, d_total: Tensor | None, *_: Any) -> Any:
    nothing: tuple[None, ...] = (None,) * (5 + len(ctx.options) + 1)
    # Once: activation checkpointing refuses to unpack them a second time.
    *tensors, factor, norm, centre, u, b, scale = ctx.saved_tensors
    needs = adapters.needed(ctx)
    if d_total is None and d_each is None:
        return (None, None, None, *nothing, None, None, None)
    if ctx.gradients is None or torch.is_grad_enabled() or d_total is None:
        upstream = d_each
        if d_total is not None:
            upstream = (d_total * (1.0 if factor is None else factor)).expand(norm.shape[-1])
        results = torch.ops.ift_kernels.linear_divergence_backward(
            *tensors, norm, centre, upstream, *ctx.options, needs, u, b, scale
        )
    else:
        saved, ctx.gradients = ctx.gradients, None
        results = saved.gradients(d_total, tensors[6], of_rows=(0, 3))
    return adapters.input_gradients(results, needs, nothing)


library.register(
    f"linear_divergence({_TENSORS}, Tensor? factor, {_OPTIONS}, bool[] needs,"
    f" {adapters.SCHEMA}) -> (Tensor each, Tensor total, Tensor norm, Tensor centre,"
    f" {linear_stats.GRADIENTS}, {adapters.GRADIENTS})",
    _divergence,
    _divergence_fake,
    _autograd,
    _setup,
)
library.register(
    f"linear_divergence_backward({_TENSORS}, Tensor norm, Tensor centre, Tensor upstream,"
    f" {_OPTIONS}, bool[] needs, {adapters.SCHEMA})"
    f" -> ({linear_stats.GRADIENTS}, {adapters.GRADIENTS})",
    _divergence_backward,
    _backward_fake,
    library.no_second_derivative("linear_divergence"),
)
