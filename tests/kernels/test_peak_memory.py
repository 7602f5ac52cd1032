"""No operation on sets of ids or soft targets holds anything of the size of the logits, at the
vocabulary of a large model."""

import pytest
import torch

from allocations import MIB, Allocations
from ift import losses
from ift_kernels import (
    linear_cross_entropy,
    linear_selected_logprobs,
    linear_soft_cross_entropy,
    linear_topk,
)

TOKENS, WIDTH, VOCABULARY, K = 64, 4, 151936, 16


def soft(hidden, weight, ids, probs, **options):
    return linear_soft_cross_entropy(
        hidden, weight, probs, ids=ids, label_smoothing=0.1, workspace=MIB, **options
    )


CALLS = {
    "selected": lambda h, w, ids: linear_selected_logprobs(
        h, w, ids, outputs=("logprob", "tail_logprob"), workspace=MIB
    ).tail_logprob,
    "in-set": lambda h, w, ids: linear_selected_logprobs(
        h, w, ids, outputs=("in_set_logprob",), workspace=MIB
    ).in_set_logprob,
    "topk": lambda h, w, ids: linear_topk(h, w, K, top_p=0.9, workspace=MIB).logprob,
    "class weights": lambda h, w, ids: linear_cross_entropy(
        h, w, ids[:, 0], class_weight=torch.ones(VOCABULARY), label_smoothing=0.1, workspace=MIB,
        return_stats=True,
    ).loss,
    "class weights and softcap": lambda h, w, ids: linear_cross_entropy(
        h, w, ids[:, 0], class_weight=torch.ones(VOCABULARY), label_smoothing=0.1, softcap=9.0,
        workspace=MIB,
    ),
    "soft, ids": lambda h, w, ids: soft(h, w, ids, torch.full(ids.shape, 1 / K)),
    "soft, function": lambda h, w, ids: soft(
        h, w, None, lambda start, stop: torch.full((TOKENS, stop - start), 1 / VOCABULARY)
    ),
    "distillation": lambda h, w, ids: losses.TopKDistillationLoss(hard_weight=0.5).from_hidden(
        h, w, ids[:, 0], ids, torch.full(ids.shape, 0.5 / K).log(),
        teacher_tail_logprob=torch.full((TOKENS,), 0.5).log(), workspace=MIB,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_nothing_has_the_size_of_the_logits(name):
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    ids = torch.arange(TOKENS * K).view(TOKENS, K) * 49  # no id twice
    with Allocations() as used:
        value = CALLS[name](hidden, weight, ids)
        if value.requires_grad:
            value.sum().backward()
    assert used.largest < TOKENS * VOCABULARY / 2, "as large as logits of four bits"
    assert used.peak < TOKENS * VOCABULARY, "as large as logits of a byte"
