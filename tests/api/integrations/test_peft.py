"""`ift.patch` on models that PEFT has changed: computed rightly, or refused by name."""

import pytest
import torch

pytest.importorskip("peft")

import peft

from causal_lms import assert_close, batch, gradients, make
from ift.config import IFTConfig
from ift.patching import patch, unpatch

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
CONFIGS = {
    "frozen head": {},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding and head saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 9]}},
    "dora": {"use_dora": True},
}


def adapted(config, name="llama", **options):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        make(name, **options), peft.LoraConfig(**{**LORA, **CONFIGS.get(config, {})})
    )
    return model.train()


def run(model, **inputs):
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "not"])
@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_learn_the_same(config, checkpointing):
    model, inputs = adapted(config), batch()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss, expected = run(model, **inputs)
    patch(model, gradient="exact")
    got_loss, got = run(model, **inputs)
    torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=1e-6)
    assert_close(got, expected)
    assert ("lm_head" in "".join(got)) == ("head" in config and config != "frozen head")


@pytest.mark.parametrize("config", CONFIGS)
def test_ift_with_checkpointing_and_a_shared_prompt_is_ift(config):
    model, inputs = patch(adapted(config), gradient="exact"), batch(prompt=8)
    options = {"embedding_grad": True}
    shared = run(model, **inputs, ift=IFTConfig(**options))
    full = run(model, **inputs, ift=IFTConfig(share_prompt=False, **options))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    again = run(model, **inputs, ift=IFTConfig(**options))
    for loss, grads in (shared, again):
        torch.testing.assert_close(loss, full[0], rtol=1e-5, atol=1e-6)
        assert_close(grads, full[1])


def test_a_frozen_head_has_no_gradient_and_takes_the_active_set():
    model = patch(adapted("frozen head"))
    run(model, **batch())
    assert model.get_base_model().lm_head.weight.grad is None


def test_switching_adapters_off_and_on():
    model, inputs = patch(adapted("head saved"), gradient="exact"), batch()
    with_adapter, _ = run(model, **inputs)
    assert torch.equal(run(model, **inputs)[0], with_adapter)
    with model.disable_adapter():
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, make("llama")(**inputs).loss)
    assert with_adapter != loss
    assert torch.equal(run(model, **inputs)[0], with_adapter)
    unpatch(model)
    assert model(**inputs).logits is not None


def test_lora_on_the_head_is_refused():
    model = peft.get_peft_model(
        make("llama"), peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]})
    )
    with pytest.raises(TypeError, match="LlamaForCausalLM has peft"):
        patch(model)
    model = patch(make("llama"))  # and after patching, at the first loss
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]})
    )
    with pytest.raises((TypeError, RuntimeError), match="head"):
        model(**batch()).loss  # noqa: B018  raises


def test_trainable_tokens_of_a_tied_head_are_refused():
    """PEFT then puts a wrapper around the head, too: its logits are not hidden @ weight.T."""
    config = peft.LoraConfig(
        **{
            **LORA,
            "trainable_token_indices": {"embed_tokens": [3, 5]},
            "target_modules": ["q_proj"],
        }
    )
    model = peft.get_peft_model(make("qwen2"), config)
    with pytest.raises((TypeError, RuntimeError), match="head"):
        patch(model)(**batch())


@pytest.mark.parametrize("target", [["embed_tokens"], ["embed_tokens", "q_proj"]])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_the_input_embedding_get_a_gradient_of_zeros(tied, target):
    """Where IFT lets none through; DDP waits for one from every parameter."""
    config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    torch.manual_seed(0)
    model = patch(peft.get_peft_model(make("llama", tie_word_embeddings=tied), config))
    for share in (True, False):
        model.zero_grad()
        model(**batch(), ift=IFTConfig(share_prompt=share)).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert bool((parameter.grad == 0).all()) == ("embed_tokens" in name), name
