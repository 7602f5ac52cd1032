"""Cross-entropy of a linear head whose targets are classes, without its logits."""

from __future__ import annotations

from typing import Literal, cast, overload

import torch
from torch import Tensor

from ift_kernels import class_targets
from ift_kernels.backends import contract
from ift_kernels.class_targets import CrossEntropyStats
from ift_kernels.common import checks
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.common.active_set import options as active_options
from ift_kernels.common.transform import LogitTransform
from ift_kernels.linear import Call, check_adapter, check_deterministic
from ift_kernels.operators import scalar_loss as _scalar_loss  # noqa: F401  registers an operator
from ift_kernels.schedule import plan


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    column_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    weight_grad_sum: str = "auto",
    gradient: str | ActiveSet = "exact",
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True],
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    column_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    weight_grad_sum: str = "auto",
    gradient: str | ActiveSet = "exact",
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
) -> CrossEntropyStats: ...
def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D) or (V, d1, ..., D)
    target: Tensor,  # (...) or (..., d1, ...)
    *,
    bias: Tensor | None = None,  # (V,) or (V, d1, ...)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., r), (V, r)
    column_scale: Tensor | None = None,  # (V,)
    class_weight: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    weight_grad_sum: str = "auto",
    gradient: str | ActiveSet = "exact",
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
    return_stats: bool = False,
) -> Tensor | CrossEntropyStats:
    """Cross-entropy of a linear head, without its logits.

    With ``z`` the logits as in `linear_logprobs`, equals::

        loss = cross_entropy(
            z, target, weight=class_weight, label_smoothing=label_smoothing, reduction="none")
        loss = loss + z_loss * logsumexp(z, -1).square()
        loss.sum() / num_items        # reduction "mean"; by default over the targets not ignored:
                                      # their number, or the sum of class_weight[target]

    Targets that are probabilities are those of `linear_soft_cross_entropy`.

    Args:
        weight, target, bias: as `linear_logprobs`. Of weight (V, d1, ..., dK, D) every output
            position is a head of its own, as in ``torch.nn.functional.linear_cross_entropy``: bias
            is (V, d1, ..., dK), target (..., d1, ..., dK), and the heads are computed in turn.
        low_rank, column_scale: as `linear_logprobs`; of weight (V, D), and without label smoothing
            beside `class_weight`.
        class_weight: (V,) floats without gradient, on which the loss of a token is multiplied by
            that of its target. Label smoothing weights every class by its own: refused with
            `deterministic`; with a softcap it costs a product more in forward and three in
            backward, and is refused inside torch.compile.
        label_smoothing: weight in [0, 1) of the uniform distribution. Default 0.
        z_loss: coefficient ≥ 0 of the squared log-sum-exp. Default 0.
        reduction: "mean", "sum" or "none" (shaped like `target`, 0 at ignored positions).
        num_items: divisor of "mean", for losses whose mean runs over several calls (gradient
            accumulation): at least 0, a number or a tensor of one; with 0 the mean is 0. Default:
            as above, of this call.
        weight_grad_sum: how a 16-bit gradient of weight is summed over blocks of tokens. "auto":
            by a schedule that rounds it at most twice on a CPU and three times on a GPU, which
            errs by up to √1.5 and √2 of a single rounding (R roundings by √((R + 1)/2)), or in
            float32 where that is faster. "float32": never so; it is one product or a float32 sum,
            rounded at the end. That can cost up to a product more. On a CPU, and before torch 2.8,
            the terms of such a sum are rounded too, which errs by √2 at most whatever their number.
            With reduction "none" and in `linear_logprobs` sums are float32 anyway.
        return_stats: return `CrossEntropyStats`: the loss, and accuracy, predicted ids, entropy and
            z-loss from the same pass. With a large batch that can cost a product more.
        The rest: as `linear_logprobs`.

    Returns:
        float32 scalar, or per-token losses. With every target ignored, or of weight 0, the mean is
        0, not NaN as in ``torch.nn.functional.cross_entropy``: such a batch sends no gradient.

    Raises:
        As `linear_logprobs`; ValueError for options outside the ranges above.

    >>> hidden, weight = torch.randn(6, 16), torch.randn(100, 16)
    >>> target = torch.randint(100, (6,))
    >>> loss = linear_cross_entropy(hidden, weight, target)
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, target))
    True
    """
    active = active_options(gradient)
    check_deterministic(deterministic, active)
    check_adapter(low_rank, column_scale, active, deterministic)
    checks.one_of("weight_grad_sum", weight_grad_sum, plan.WEIGHT_SUMS)
    checks.boolean("return_stats", return_stats)
    fp32_weight_sum = weight_grad_sum == "float32"
    ignore_index = checks.integer("ignore_index", ignore_index)
    options = class_targets.LossOptions.checked(label_smoothing, z_loss, reduction, num_items)
    label_smoothing, z_loss = options.label_smoothing, options.z_loss
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    adapted = low_rank is not None or column_scale is not None
    if adapted and class_weight is not None and label_smoothing:
        raise ValueError(
            "label_smoothing: expected 0 with class_weight beside low_rank or column_scale, "
            f"got {label_smoothing}"
        )
    if isinstance(weight, Tensor) and weight.dim() > 2:
        if adapted:
            raise ValueError(
                f"weight: expected shape (V, D) with low_rank or column_scale, "
                f"got {tuple(weight.shape)}"
            )
        return class_targets.of_output_dims(
            linear_cross_entropy, hidden, weight, target, bias, class_weight, options, return_stats,
            ignore_index, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
            weight_grad_sum=weight_grad_sum, gradient=gradient, logits_dtype=logits_dtype,
            deterministic=deterministic, workspace=workspace,
        )  # fmt: skip
    call = Call(
        hidden, weight, target, bias, ignore_index, transform, workspace, logits_dtype,
        deterministic, low_rank, column_scale,
    )  # fmt: skip
    valid = call.tensors[3] != ignore_index
    of_target: Tensor | None = None
    if class_weight is not None:
        class_targets.check_class_weight(class_weight, weight)
        class_targets.check_deterministic(deterministic, label_smoothing)
        of_target = class_targets.weight_of_targets(class_weight, call.tensors[3], valid)
    factor = options.factor(valid if of_target is None else of_target)
    grads_in_forward = reduction != "none" and call.schedule != "recompute"
    grads_in_forward = grads_in_forward and class_weight is None and not return_stats
    if grads_in_forward and call.plan(active, fp32_weight_sum).schedule == "forward":
        results = torch.ops.ift_kernels.linear_loss(
            *call.tensors, factor, *call.options, label_smoothing, z_loss, fp32_weight_sum,
            call.needs, call.for_hidden(active), *call.adapter,
        )  # fmt: skip
        return cast(Tensor, results[0])
    track = contract.TRACK_MEAN if label_smoothing and of_target is None else 0
    extra = contract.TRACK_ARGMAX | contract.TRACK_ENTROPY if return_stats else 0
    stats = call.statistics(track | extra, active, track)
    loss = -stats.logprob
    if class_weight is not None and of_target is not None:
        loss = loss * of_target.view(call.shape).to(loss.dtype)
        if label_smoothing:
            uniform = class_targets.uniform_loss(
                hidden, weight, bias, class_weight, valid.view(call.shape), stats.lse, call.options
            )
            loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
    elif label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * stats.mean_logit
    if z_loss:
        loss = loss + z_loss * stats.lse.square()
    loss = options.reduced(loss, factor)
    if not return_stats:
        return loss
    return CrossEntropyStats(
        loss,
        class_targets.accuracy(stats.argmax, target, valid.view(call.shape)),
        stats.argmax,
        stats.entropy.detach(),
        options.reduced(z_loss * stats.lse.detach().square(), factor),
    )
