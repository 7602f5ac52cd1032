"""`ift.patch` on models that PEFT has changed: computed rightly, or refused by name."""

import pytest
import torch

from causal_lms import assert_same_step, batch, lora, make, step
from ift.config import IFTConfig
from ift.patching import patch, unpatch

pytest.importorskip("peft")
CONFIGS = {
    "frozen head": {},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding and head saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 9]}},
    "dora": {"use_dora": True},
}


def adapted(config):
    return lora(make("llama"), **CONFIGS[config])


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "not"])
@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_learn_the_same(config, checkpointing):
    model, inputs = adapted(config), batch()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    expected = step(model, **inputs)
    got = step(patch(model, gradient="exact"), **inputs)
    assert_same_step(got, expected)
    assert ("lm_head" in "".join(got[1])) == ("head" in config and config != "frozen head")


@pytest.mark.parametrize("config", CONFIGS)
def test_ift_with_checkpointing_and_a_shared_prompt_is_ift(config):
    model, inputs = patch(adapted(config), gradient="exact"), batch(prompt=8)
    options = {"embedding_grad": True}
    shared = step(model, **inputs, ift=IFTConfig(**options))
    full = step(model, **inputs, ift=IFTConfig(share_prompt=False, **options))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    again = step(model, **inputs, ift=IFTConfig(**options))
    for found in (shared, again):
        assert_same_step(found, full)


def test_a_frozen_head_has_no_gradient_and_takes_the_active_set():
    model = patch(adapted("frozen head"))
    step(model, **batch())
    assert model.get_base_model().lm_head.weight.grad is None


def test_switching_adapters_off_and_on():
    model, inputs = patch(adapted("head saved"), gradient="exact"), batch()
    with_adapter, _ = step(model, **inputs)
    assert torch.equal(step(model, **inputs)[0], with_adapter)
    with model.disable_adapter():
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, make("llama")(**inputs).loss)
    assert with_adapter != loss
    assert torch.equal(step(model, **inputs)[0], with_adapter)
    unpatch(model)
    assert model(**inputs).logits is not None


def test_trainable_tokens_of_a_tied_head_are_refused():
    """PEFT then puts a wrapper around the head, too: its logits are not hidden @ weight.T."""
    tokens = {"trainable_token_indices": {"embed_tokens": [3, 5]}}
    model = lora(make("qwen2"), target_modules=["q_proj"], **tokens)
    with pytest.raises((TypeError, RuntimeError), match="head"):
        patch(model)(**batch())


@pytest.mark.parametrize("target", [["embed_tokens"], ["embed_tokens", "q_proj"]])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_the_input_embedding_get_a_gradient_of_zeros(tied, target):
    """Where IFT lets none through; DDP waits for one from every parameter."""
    model = patch(lora(make("llama", tie_word_embeddings=tied), target_modules=target))
    for share in (True, False):
        model.zero_grad()
        model(**batch(), ift=IFTConfig(share_prompt=share)).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert bool((parameter.grad == 0).all()) == ("embed_tokens" in name), name
