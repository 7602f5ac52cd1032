"""The operations on a head by their formulas in eager torch, over whole logits.

In fp64 they are what errors are measured against; in the dtype of a model, what a dense head gives.
Nothing of `ift_kernels` is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORE_INDEX = -100


def logits(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(..., V). The product in the dtype of the inputs, everything after it in fp32 (or fp64)."""
    z = hidden @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = logit_scale * z
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def statistics(z: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX) -> dict[str, Tensor]:
    """Every field of `ift_kernels.TokenStats` and the target's logit, 0 at ignored positions."""
    logp = z.log_softmax(-1)
    valid = target != ignore_index
    ids = torch.where(valid, target, 0).long()[..., None]
    second = logp.topk(2).values[..., 1] if z.shape[-1] > 1 else torch.full_like(ids[..., 0], 0)
    every = {
        "logprob": logp.gather(-1, ids)[..., 0],
        "lse": z.logsumexp(-1),
        "entropy": -_times(logp.exp(), logp).sum(-1),
        "argmax": z.argmax(-1),
        "argmax_logprob": logp.amax(-1),
        "second_logprob": second if z.shape[-1] > 1 else z[..., 0] - torch.inf,
        "sum_sq": logp.exp().square().sum(-1),
        "mean_logit": z.mean(-1),
        "target_logit": z.gather(-1, ids)[..., 0],
    }
    return {name: torch.where(valid, value, 0) for name, value in every.items()}


def cross_entropy(
    z: Tensor,
    target: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | None = None,
) -> Tensor:
    """The loss of `ift_kernels.linear_cross_entropy`; 0 where every target is ignored."""
    found = statistics(z, target, ignore_index)
    loss = -found["logprob"]
    if label_smoothing:
        uniform = found["mean_logit"] - found["lse"]
        loss = (1 - label_smoothing) * loss - label_smoothing * uniform
    return reduced(
        loss + z_loss * found["lse"].square(), target != ignore_index, reduction, num_items
    )


def divergence(student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """(...) from the logits of both: "forward", "reverse" or "jsd"."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "forward":
        return _times(t.exp(), t - s).sum(-1)
    if kind == "reverse":
        return _times(s.exp(), s - t).sum(-1)
    s, t = s.clamp(min=-1e5), t.clamp(min=-1e5)  # of two infinities there is no gradient
    m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    mixed = (1 - beta) * _times(s.exp(), s - m) + beta * _times(t.exp(), t - m)
    return mixed.sum(-1)


def expected_embedding(z: Tensor, embedding: Tensor) -> Tensor:
    """(..., E): the mean embedding under the prediction."""
    return z.softmax(-1).to(embedding.dtype) @ embedding


def reduced(each: Tensor, valid: Tensor, reduction: str, num_items: float | None = None) -> Tensor:
    """Losses per token under a reduction; "mean" over the valid ones, or `num_items` of them."""
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    count = int(valid.sum().clamp(min=1)) if num_items is None else num_items
    return each.sum() / count if count else each.sum() * 0


def _times(probability: Tensor, factor: Tensor) -> Tensor:
    """The product, 0 where the probability is 0: a forbidden token has an infinite factor."""
    return probability * torch.where(probability > 0, factor, 0)


def selected(z: Tensor, ids: Tensor, ignore_index: int = IGNORE_INDEX) -> dict[str, Tensor]:
    """Every output of `linear_selected_logprobs` from logits (..., V) and ids (..., K)."""
    there = ids != ignore_index
    valid, at = there.any(-1), torch.where(there, ids, 0)
    logp = z.log_softmax(-1)
    inside = torch.zeros(z.shape, device=z.device).scatter_add(-1, at, there.float()) > 0
    # Of no ids any numbers, which nothing takes: -inf alone would be NaN, and so its gradient.
    of_ids = z.gather(-1, at).masked_fill(~there, -torch.inf).masked_fill(~valid[..., None], 0.0)
    tail = logp.masked_fill(inside, -torch.inf)
    tail = tail.masked_fill((inside.all(-1) | ~valid)[..., None], 0.0).logsumexp(-1)
    found = {
        "lse": z.logsumexp(-1),
        "in_set_lse": of_ids.logsumexp(-1),
        "tail_logprob": torch.where(inside.all(-1), -torch.inf, tail),
    }
    found = {name: torch.where(valid, value, 0) for name, value in found.items()}
    per_id = {"logprob": logp.gather(-1, at), "in_set_logprob": of_ids.log_softmax(-1)}
    return found | {name: torch.where(there, value, 0) for name, value in per_id.items()}
