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
    weight: Tensor,  # (V, D) or (V, d1, ..., D)
    probs: Tensor | Probabilities,  # (..., K), or of (start, stop)
    *,
    ids: Tensor | None = None,  # (..., K)
    mask: Tensor | None = None,  # (...)
    bias: Tensor | None = None,  # (V,) or (V, d1, ...)
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

    which is ``torch.nn.functional.cross_entropy(z, q, class_weight)``, whose classes are its second
    dimension: q need not sum to 1, and the mean is over tokens, whatever the weights. A class of
    probability 0 adds 0, where its logit is -inf too.

    Args:
        hidden, weight, bias: as `linear_logprobs`. Of weight (V, d1, ..., dK, D) every output
            position is a head of its own, with bias (V, d1, ..., dK): (...) of the other arguments
            and of the losses ends in d1, ..., dK then. The heads are computed in turn, with a call
            of the function for each chunk of each.
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
        label_smoothing: weight in [0, 1) of the uniform distribution. Default 0. With `ids` and a
            softcap it costs one product more in forward and three in backward, and is refused
            inside torch.compile.
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
    heads, biases = class_targets.heads_of(hidden, weight, bias)
    if class_weight is not None:
        class_targets.check_class_weight(class_weight, weight)
    positions = torch.Size((*hidden.shape[:-1], *weight.shape[1:-1]))
    valid = torch.ones(positions, dtype=torch.bool, device=hidden.device)
    if mask is not None:
        valid = checks.as_bool_mask(mask, valid, "the output positions")
    dtype = checks.compute_dtype(hidden, heads[0], logits_dtype)
    of_head = head_call.Options(
        ignore_index, transform.scale, transform.softcap, transform.temperature,
        checks.workspace_bytes(workspace, hidden.device, dtype), dtype, False,
    )  # fmt: skip
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
        # A chunk has the columns of every head.
        of_head = of_head._replace(workspace=of_head.workspace // len(heads))
        rows = hidden.reshape(-1, hidden.shape[-1])
        found = []
        for at, (head, b) in enumerate(zip(heads, biases, strict=True)):
            source = _source(probs, positions, at, len(heads), head, dtype, class_weight, options)
            if not at and torch.is_grad_enabled():  # the operator could not see a gradient
                source(slice(0, 1))
            of_rows = valid.reshape(len(rows), len(heads))[:, at]
            found.append(dense_targets.cross_entropy(rows, head, b, of_rows, source, of_head))
    else:
        ids = check_ids(ids, valid[..., None])
        _check_probs(probs, ids)
        assert isinstance(probs, Tensor)
        ids = ids.masked_fill(~valid[..., None], ignore_index)
        valid = (ids != ignore_index).any(-1)
        each_ids, each_probs = (
            t.reshape(*hidden.shape[:-1], len(heads), t.shape[-1]).unbind(-2) for t in (ids, probs)
        )
        found = [
            _of_ids(hidden, *of, class_weight, options, of_head, logits_dtype, workspace)
            for of in zip(heads, biases, each_ids, each_probs, strict=True)
        ]
    loss, lse = (torch.stack(parts, -1).view(positions) for parts in zip(*found, strict=True))
    if z_loss:
        loss = loss + options.z_loss * lse.square()
    return options.reduced(loss, options.factor(valid))


def _of_ids(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    ids: Tensor,  # (..., K)
    probs: Tensor,  # (..., K)
    class_weight: Tensor | None,
    options: class_targets.LossOptions,
    of_head: head_call.Options,
    logits_dtype: torch.dtype | None,
    workspace: int | None,
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps (...) of one head."""
    found = linear_selected_logprobs(
        hidden, weight, ids, bias=bias, ignore_index=of_head.ignore_index,
        logit_scale=of_head.scale, softcap=of_head.softcap or None,
        temperature=of_head.temperature, outputs=("logprob", "lse"), logits_dtype=logits_dtype,
        workspace=workspace,
    )  # fmt: skip
    assert found.logprob is not None and found.lse is not None
    lse, there = found.lse, ids != of_head.ignore_index
    probs = probs.masked_fill(~there, 0.0).to(lse.dtype)
    if class_weight is not None:
        probs = probs * class_weight.to(lse.dtype)[ids.clamp(0, len(weight) - 1)]
    # 0 times an infinity; elsewhere a probability of 0 may have a gradient.
    logprob = found.logprob.masked_fill((probs == 0) & found.logprob.isinf(), 0.0)
    smoothing = options.label_smoothing
    loss = (smoothing - 1.0) * (probs * logprob).sum(-1)
    if smoothing:
        loss = loss + smoothing * class_targets.uniform_loss(
            hidden, weight, bias, class_weight, there.any(-1), lse, of_head
        )
    return loss, lse


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
    positions: torch.Size,
    at: int,  # of so many heads
    heads: int,
    weight: Tensor,  # (V, D)
    dtype: torch.dtype,
    class_weight: Tensor | None,
    options: class_targets.LossOptions,
) -> dense_targets.Source:
    """Weighted and smoothed probabilities (N, C) of columns of one head."""
    device, accum, smoothing = weight.device, accum_dtype(dtype), options.label_smoothing

    def source(columns: slice) -> Tensor:
        start, stop = columns.start, columns.stop
        found, shape = probs(start, stop), (*positions, stop - start)
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
        q = found.reshape(-1, heads, stop - start)[:, at].to(accum)
        if smoothing:
            q = q * (1.0 - smoothing) + smoothing / len(weight)
        return q if class_weight is None else q * class_weight[columns].to(accum)

    return source
