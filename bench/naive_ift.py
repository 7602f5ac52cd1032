"""The released IFT algorithm in plain torch, step by step: the baseline of tests and measurements.

It follows the released code of arXiv 2405.11870: full logits twice, a frozen copy of the input
embedding, and relations propagated by a dense (T, T) matrix. Nothing of `ift_kernels` is used. Only
these faults of the released code are mended, each marked where it is:

1. the softmax norm overwrote what its own backward needs;
2. kind "mask" divided and summed bools;
3. a row without response tokens, or with losses of 0 only, was 0/0 and poisoned the batch.

The two objectives that the released code does not have, "paper" and "algorithm1", are written out
as sums over pairs of positions.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def naive_ift_loss(
    model: nn.Module,
    input_ids: Tensor,  # (B, T), as are labels and attention_mask
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    lam: float = 0.2,
    gamma: float = 0.95,
    objective: str = "released",
    kind: str = "loss",
    side: str = "left",
    norm: str = "L1",
    detach: bool = False,
    rule: str = "greedy",
    k: int = 2,
    temperature: float = 0.7,
    embedding: nn.Module | None = None,
    predicted: Tensor | None = None,
) -> Tensor:
    """IFT loss of a causal language model of the transformers kind, by two full passes.

    Args:
        embedding: the frozen copy of the input embedding (`frozen_embedding`, renewed by `refresh`
            after every optimizer step). None: the model's own table as it is, without gradient.
        predicted: (B, T) tokens predicted at each position, in place of a first pass: to compare
            two implementations where an argmax is a tie within rounding.
    """
    with torch.no_grad():
        embeds = (embedding or model.get_input_embeddings())(input_ids)
    if predicted is None:
        with torch.no_grad():
            logits = model(inputs_embeds=embeds, attention_mask=attention_mask).logits
            predicted = naive_predict(logits, rule=rule, k=k, temperature=temperature)
    shifted = torch.cat([input_ids[:, :1], predicted[:, :-1]], dim=1)
    further = torch.where(labels == -100, input_ids, shifted)
    with torch.no_grad():
        embeds_further = (embedding or model.get_input_embeddings())(further)
    mixed = (1 - lam) * embeds + lam * embeds_further
    logits = model(inputs_embeds=mixed, attention_mask=attention_mask).logits
    logprob, mask = naive_logprob(logits, labels)
    return naive_propagation_loss(
        logprob,
        mask,
        gamma=gamma,
        objective=objective,
        kind=kind,
        side=side,
        norm=norm,
        detach=detach,
    )


def naive_sft_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Mean over rows of the mean loss of their response tokens, by way of full logits."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    logprob, mask = naive_logprob(logits, labels)
    tokens = mask.sum(-1)
    return (-logprob.sum(-1) / tokens.clamp(min=1)).sum() / (tokens > 0).sum().clamp(min=1)


def frozen_embedding(model: nn.Module) -> nn.Module:
    """The released code's second input embedding, which no gradient reaches."""
    return copy.deepcopy(model.get_input_embeddings()).requires_grad_(False)


def refresh(embedding: nn.Module, model: nn.Module) -> None:
    """Copy the model's input embedding into its frozen copy: after every optimizer step."""
    embedding.load_state_dict(model.get_input_embeddings().state_dict())


def naive_predict(logits: Tensor, *, rule: str, k: int = 2, temperature: float = 0.7) -> Tensor:
    """The token that the model would have said at each position, (B, T)."""
    if rule == "greedy":
        return logits.argmax(-1)
    if rule == "topk":
        return logits.topk(k, dim=-1).indices[..., -1]
    if rule == "sample":  # called nucleus in the released code, which draws from everything
        p = (logits.float() / temperature).softmax(-1)
        return p.flatten(0, 1).multinomial(1).view(p.shape[:2])
    raise ValueError(f"rule: expected one of ['greedy', 'sample', 'topk'], got {rule!r}")


def naive_logprob(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each next label, 0 where there is none, and the mask: (B, T − 1)."""
    labels = labels[:, 1:]
    mask = labels != -100
    logprob = logits[:, :-1].float().log_softmax(-1)
    return logprob.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask, mask


def naive_propagation_loss(
    logprob: Tensor,  # (B, T), shifted
    mask: Tensor,  # (B, T) bool
    *,
    gamma: float = 0.95,
    objective: str = "released",
    kind: str = "loss",
    side: str = "left",
    norm: str = "L1",
    detach: bool = False,
) -> Tensor:
    """The loss of the second pass, scalar: the mean over rows that have response tokens."""
    loss = -logprob * mask
    tokens = mask.sum(-1)
    if objective not in ("released", "paper", "algorithm1"):
        raise ValueError(f"objective: expected released, paper or algorithm1, got {objective!r}")
    if objective == "released":
        weights = naive_weights(logprob, mask, gamma=gamma, kind=kind, side=side, norm=norm)
        weights = weights.detach() if detach else weights
        per_row = (loss * weights).sum(-1) / tokens.clamp(min=1)  # fault 3
    else:
        pairs = _relations(mask.shape[1], gamma, loss)
        pairs = pairs * mask[:, :, None] * mask[:, None, :]  # [row, n, i]: n's loss reaches i ≥ n
        reached = loss[:, None, :]
        if objective == "algorithm1":
            reached = loss[:, :, None] * (reached.detach() if detach else reached)
        per_row = (pairs * reached).sum((-2, -1))
    return per_row.sum() / (tokens > 0).sum().clamp(min=1)  # fault 3


def naive_weights(
    logprob: Tensor, mask: Tensor, *, gamma: float, kind: str, side: str, norm: str
) -> Tensor:
    """The weights of the released code, which sum to N in every row; (B, T)."""
    if gamma == 0:
        return torch.ones_like(logprob)
    tokens = mask.sum(-1, keepdim=True)
    if kind == "mask":
        item = mask.to(logprob.dtype)  # fault 2
    elif kind == "loss":
        item = -logprob / tokens.clamp(min=1)  # fault 3
    elif kind == "logps":
        item = -logprob
    else:
        raise ValueError(f"kind: expected one of ['logps', 'loss', 'mask'], got {kind!r}")
    item = item.masked_fill(~mask, 0)
    relations = _relations(mask.shape[1], gamma, logprob)
    if side == "left":
        c = (item @ relations.T).masked_fill(~mask, 0)
        v = {"L1": c, "L2": c**2, "softmax": c.softmax(-1), "log": (c + 1).log()}[norm]
    elif side == "right":
        c = (item @ relations).masked_fill(~mask, 1e6)
        c = c + c[c != 0].min()
        v = {"L1": 1 / c, "L2": 1 / c**2, "softmax": (1 / c).softmax(-1), "log": 1 / (c + 1).log()}[
            norm
        ]
    else:
        raise ValueError(f"side: expected one of ['left', 'right'], got {side!r}")
    v = v.masked_fill(~mask, 0)  # fault 1: not in place, here and below
    total = v.sum(-1, keepdim=True)
    return v * (tokens / total.masked_fill(total == 0, 1))  # fault 3


def _relations(length: int, gamma: float, like: Tensor) -> Tensor:
    """U[t, j] = gamma ** (j − t) for j ≥ t, else 0; (T, T)."""
    position = torch.arange(length, device=like.device)
    distance = position[None, :] - position[:, None]
    return torch.where(distance >= 0, float(gamma) ** distance.clamp(min=0).to(like.dtype), 0)
