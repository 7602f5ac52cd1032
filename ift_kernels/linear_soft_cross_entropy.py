"""Cross-entropy of a linear head against probabilities, without its logits.

Few ids a token go through `linear_selected_logprobs`; whole rows come in chunks of columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ift_kernels import class_targets
from ift_kernels.common import checks
from ift_kernels.common.transform import LogitTransform
from ift_kernels.linear_selected import check_ids, linear_selected_logprobs
from ift_kernels.operators import dense_targets, head_call
from ift_kernels.schedule.accumulate import accum_dtype

Probabilities = Callable[[int, int], Tensor]
IGNORE_INDEX = -100


def linear_soft_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    probs: Tensor | Probabilities,  # (..., K), or of (start, stop)
    *,
    ids: Tensor | None = None,  # (..., K)
    mask: Tensor | None = None,  # (...)
    bias: Tensor | None = None,  # (V,)
    class_weight: Tensor | None = None,  # (V,)
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Cross-entropy of a linear head against probabilities of classes, without its logits.

    With ``z`` the logits as in `linear_logprobs`, and probabilities q (..., V), equals::

        q = (1 - label_smoothing) * q + label_smoothing / V
        loss = -(class_weight * q * z.log_softmax(-1)).sum(-1)
        loss = loss + z_loss * logsumexp(z, -1).square()
        loss.sum() / num_items        # reduction "mean"; by default over the tokens that count

    which is ``torch.nn.functional.cross_entropy(z, q, class_weight)`` of two-dimensional z: q need
    not sum to 1, and its mean is over tokens, whatever the weights. A class of probability 0 adds
    0, where its logit is -inf too.

    Args:
        hidden, weight, bias: as `linear_logprobs`.
        probs: with `ids`, (..., K) floats, the probabilities of these ids; all others have 0.
            Differentiable. Without, a function of two ints, ``probs(start, stop)``, that returns
            the probabilities (..., stop - start) of the classes in [start, stop), for all tokens:
            ``lambda start, stop: q[..., start:stop]`` of a dense q. It is a constant: called
            without gradient and autocast, once for every chunk in forward and again in backward,
            when it must return the same. Where gradients are enabled it is called for one class
            before, and refused if its result has one.
        ids: (..., K) int64 or int32, K from 1 to 512, no id twice for a token.
        mask: (...) bool or 0/1: tokens that count; None: all. The others have loss 0 and send no
            gradient.
        class_weight: (V,) floats without gradient. Default None: 1.
        ignore_index: with `ids`: those with this value pad a smaller set, whatever their
            probability. A token all of whose ids are does not count.
        label_smoothing: weight in [0, 1) of the uniform distribution. Default 0. With `ids` it is
            refused with a softcap.
        z_loss, reduction, num_items: as `linear_cross_entropy`.
        logit_scale, softcap, temperature, logits_dtype: as `linear_logprobs`.
        workspace: as `linear_logprobs`; a chunk of probabilities is part of it. A function with
            temporaries of its own takes them beside it.

    Costs: with `ids` those of `linear_selected_logprobs`; of a function, one product of hidden and
    weight in forward and three in backward.

    Returns:
        float32 (float64 for float64 inputs) scalar, or per-token losses. Where no token counts the
        mean is 0.

    Raises:
        TypeError, ValueError: as `linear_logprobs` and `linear_selected_logprobs`; probabilities
            of another shape or device, or with a gradient that a function's would lose.
        RuntimeError: as `linear_logprobs`.

    >>> hidden, weight = torch.randn(6, 16), torch.randn(100, 16)
    >>> q = torch.randn(6, 100).softmax(-1)
    >>> loss = linear_soft_cross_entropy(hidden, weight, lambda start, stop: q[:, start:stop])
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, q))
    True
    >>> top = q.topk(8)
    >>> loss = linear_soft_cross_entropy(hidden, weight, top.values, ids=top.indices)
    >>> q = torch.zeros_like(q).scatter(1, top.indices, top.values)
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, q))
    True
    """
    options = class_targets.LossOptions.checked(label_smoothing, z_loss, reduction, num_items)
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    ignore_index = checks.integer("ignore_index", ignore_index)
    checks.head_arguments(hidden, weight, bias)
    if class_weight is not None:
        class_targets.check_class_weight(class_weight, weight)
    if mask is None:
        valid = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    else:
        valid = checks.as_bool_mask(mask, hidden[..., 0], "hidden without its last dimension")
    if ids is None:
        if isinstance(probs, Tensor) or not callable(probs):
            raise TypeError(
                "probs: expected a function of (start, stop), or a tensor (..., K) with ids, got "
                f"{type(probs).__name__} without ids"
            )
        if ignore_index != IGNORE_INDEX:
            raise ValueError(
                f"ignore_index: expected {IGNORE_INDEX} without ids, got {ignore_index}; tokens "
                "that do not count go into mask"
            )
        dtype = checks.compute_dtype(hidden, weight, logits_dtype)
        source = _source(probs, hidden, len(weight), dtype, class_weight, label_smoothing)
        if torch.is_grad_enabled():  # the operator could not see a gradient
            source(slice(0, 1))
        loss, lse = dense_targets.cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), weight, bias, valid.reshape(-1), source,
            head_call.Options(
                -1, transform.scale, transform.softcap, transform.temperature,
                checks.workspace_bytes(workspace, hidden.device, dtype), dtype, False,
            ),
        )  # fmt: skip
        loss, lse = loss.view(valid.shape), lse.view(valid.shape)
    else:
        class_targets.check_smoothing(transform, label_smoothing, "ids")
        ids = check_ids(ids, hidden)
        _check_probs(probs, ids)
        assert isinstance(probs, Tensor)
        ids = ids.masked_fill(~valid[..., None], ignore_index)
        there = ids != ignore_index
        valid = there.any(-1)
        found = linear_selected_logprobs(
            hidden, weight, ids, bias=bias, ignore_index=ignore_index, logit_scale=logit_scale,
            softcap=softcap, temperature=temperature, outputs=("logprob", "lse"),
            logits_dtype=logits_dtype, workspace=workspace,
        )  # fmt: skip
        assert found.logprob is not None and found.lse is not None
        lse = found.lse
        probs = probs.masked_fill(~there, 0.0).to(lse.dtype)
        factor = 1.0 - label_smoothing
        if class_weight is not None:
            at = ids.clamp(0, len(weight) - 1)
            probs = probs * class_weight.to(lse.dtype)[at]
        # 0 times an infinity; elsewhere a probability of 0 may have a gradient.
        logprob = found.logprob.masked_fill((probs == 0) & found.logprob.isinf(), 0.0)
        loss = -factor * (probs * logprob).sum(-1)
        if label_smoothing:
            uniform = class_targets.uniform_loss(hidden, weight, bias, class_weight, transform, lse)
            loss = loss + label_smoothing * torch.where(valid, uniform, 0.0)
    if z_loss:
        loss = loss + options.z_loss * lse.square()
    return options.reduced(loss, options.factor(valid))


def _check_probs(probs: object, ids: Tensor) -> None:
    if not isinstance(probs, Tensor):
        raise TypeError(f"probs: expected a tensor like ids, got {type(probs).__name__}")
    checks.floating("probs", probs)
    if probs.shape != ids.shape or probs.device != ids.device:
        raise ValueError(
            f"probs: expected shape {tuple(ids.shape)} on {ids.device} like ids, "
            f"got {tuple(probs.shape)} on {probs.device}"
        )


def _source(
    probs: Probabilities,
    hidden: Tensor,
    vocabulary: int,
    dtype: torch.dtype,
    class_weight: Tensor | None,
    smoothing: float,
) -> dense_targets.Source:
    """Weighted and smoothed probabilities (N, C) of columns."""
    tokens, device, accum = hidden.shape[:-1], hidden.device, accum_dtype(dtype)

    def source(columns: slice) -> Tensor:
        start, stop = columns.start, columns.stop
        found, shape = probs(start, stop), (*tokens, stop - start)
        if not isinstance(found, Tensor):
            raise TypeError(f"probs: expected a function to a Tensor, got {type(found).__name__}")
        checks.floating("probs", found)
        if found.shape != shape or found.device != device:
            raise ValueError(
                f"probs: expected shape {tuple(shape)} on {device} for columns {start} to {stop}, "
                f"got {tuple(found.shape)} on {found.device}"
            )
        if found.requires_grad:
            raise ValueError(
                "probs: expected a constant from a function, got requires_grad=True; give it with "
                "ids, or detach it"
            )
        q = found.reshape(-1, stop - start).to(accum)
        if smoothing:
            q = q * (1.0 - smoothing) + smoothing / vocabulary
        return q if class_weight is None else q * class_weight[columns].to(accum)

    return source
