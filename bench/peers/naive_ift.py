"""The released IFT algorithm in plain torch, step by step: the baseline of tests and measurements.

It follows the released code of arXiv 2405.11870: full logits twice and a frozen copy of the input
embedding. The formulas on log-probabilities are in `ift.checking.naive`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ift.checking.naive import naive_logprob, naive_predict, naive_propagation_loss, naive_weights

__all__ = ("frozen_embedding", "naive_ift_loss", "naive_logprob", "naive_predict",
           "naive_propagation_loss", "naive_sft_loss", "naive_weights", "refresh")  # fmt: skip


def naive_ift_loss(
    model: nn.Module,
    input_ids: Tensor,  # (B, T), as are labels and attention_mask
    labels: Tensor, attention_mask: Tensor | None = None, *, lam: float = 0.2, gamma: float = 0.95,
    objective: str = "released", kind: str = "loss", side: str = "left", norm: str = "L1",
    detach: bool = False, rule: str = "greedy", k: int = 2, temperature: float = 0.7,
    embedding: nn.Module | None = None, predicted: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    mixed_in = torch.where(labels == -100, input_ids, shifted)
    with torch.no_grad():
        mixed_in_embeds = (embedding or model.get_input_embeddings())(mixed_in)
    mixed = (1 - lam) * embeds + lam * mixed_in_embeds
    logits = model(inputs_embeds=mixed, attention_mask=attention_mask).logits
    logprob, mask = naive_logprob(logits, labels)
    return naive_propagation_loss(
        logprob, mask, gamma=gamma, objective=objective, kind=kind, side=side, norm=norm,
        detach=detach,
    )  # fmt: skip


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
