"""The plain port against the package on a small model: residual, shift, mask and loss together."""

import pytest
import torch

from bench.peers import naive_ift
from causal_lms import make
from ift.losses import ift_loss
from ift_kernels import temporal_residual

OPTIONS = {
    "default": {},
    "softmax": {"norm": "softmax"},
    "right": {"side": "right"},
    "mask": {"kind": "mask", "norm": "L2"},
    "paper": {"objective": "paper"},
}


@pytest.fixture(scope="module")
def model():
    return make("llama", vocab_size=61).eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rule", ["greedy", "kth"])
def test_whole_algorithm_equals_the_port(backend, model, options, rule):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(61, (3, 14), generator=g)
    attention = torch.ones_like(ids)
    attention[1, 10:] = 0
    labels = ids.masked_fill(torch.arange(14) < torch.tensor([[4], [2], [6]]), -100)
    labels = labels.masked_fill(attention == 0, -100)
    parameters = [p for n, p in model.named_parameters() if "embed_tokens" not in n]
    port = naive_ift.naive_ift_loss(model, ids, labels, attention, rule=rule, lam=0.3, **options)
    expected = torch.autograd.grad(port, parameters)

    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits
        predicted = naive_ift.naive_predict(logits, rule=rule)
    table = model.get_input_embeddings().weight.detach()
    embeds = temporal_residual(table, ids, predicted, labels, 0.3)
    logits = model(inputs_embeds=embeds, attention_mask=attention).logits
    target = labels[:, 1:]
    logprob = logits[:, :-1].log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    named = {"propagation" if key == "kind" else key: value for key, value in options.items()}
    ours = ift_loss(logprob, target != -100, **named)
    torch.testing.assert_close(ours, port, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_port_keeps_its_frozen_copy(model):
    copy = naive_ift.frozen_embedding(model)
    ids = torch.arange(12).view(2, 6)
    fresh = naive_ift.naive_ift_loss(model, ids, ids)
    assert torch.equal(naive_ift.naive_ift_loss(model, ids, ids, embedding=copy), fresh)
    fresh.backward()
    assert model.get_input_embeddings().weight.grad is None  # untied: no gradient at all
    assert model.lm_head.weight.grad is not None
    model.zero_grad()
    table = model.get_input_embeddings().weight
    kept = table.detach().clone()
    with torch.no_grad():
        table.mul_(1.5)
    try:
        assert torch.equal(naive_ift.naive_ift_loss(model, ids, ids, embedding=copy), fresh)
        naive_ift.refresh(copy, model)
        changed = naive_ift.naive_ift_loss(model, ids, ids, embedding=copy)
        assert not torch.equal(changed, fresh)
        assert torch.equal(changed, naive_ift.naive_ift_loss(model, ids, ids))
    finally:
        with torch.no_grad():
            table.copy_(kept)


def test_port_without_either_part_is_naive_sft(model):
    ids = torch.arange(12).view(2, 6)
    labels = ids.masked_fill(torch.arange(6) < torch.tensor([[2], [4]]), -100)
    ift = naive_ift.naive_ift_loss(model, ids, labels, lam=0.0, gamma=0.0)
    torch.testing.assert_close(ift, naive_ift.naive_sft_loss(model, ids, labels))
