"""PEFT's LoRA and DoRA on the output head: computed as the unpatched model does, or refused."""

import copy

import pytest
import torch

from causal_lms import assert_as_dense, assert_close, assert_same_step, batch, gradients, lora, make
from causal_lms import step as one_step
from ift.config import IFTConfig
from ift.dynamics.evaluate import head_ready
from ift.frozen_head import frozen_head
from ift.head_parts import head_parts, weight_norm
from ift.head_pass import head_pass, plain_head
from ift.losses import dpo_loss
from ift.patching import patch, unpatch

peft = pytest.importorskip("peft")
HEAD = ["q_proj", "lm_head"]
# Architecture and options of LoRA.
CONFIGS = {
    "lora": ("llama", {}),
    "rslora and dropout": ("llama", {"use_rslora": True, "lora_dropout": 0.3}),
    "bias": ("phi", {"lora_bias": True, "target_modules": ["lm_head"], "init_lora_weights": False}),
    "dora": ("phi", {"use_dora": True, "lora_alpha": 3}),
    "tied, softcap": ("gemma2", {}),
    "tied, scaled": ("cohere", {"use_dora": True}),
    "embedding saved": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "trainable tokens": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 5]}}),
    "embedding too": ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
}


def adapted(config="lora", **options):
    name, given = CONFIGS[config]
    return lora(make(name), **{"target_modules": HEAD, **given, **options})


def step(model, **inputs):
    torch.manual_seed(3)  # of dropout
    return one_step(model, **inputs)


@pytest.mark.parametrize("config", CONFIGS)
def test_sft_and_ift_are_those_of_the_logits(config):
    model, inputs = adapted(config), batch()
    expected = step(model, **inputs)
    got = step(patch(model), **inputs)
    assert_same_step(got, expected)
    assert any("lm_head.lora_B" in name for name, g in got[1].items() if g is not None and g.any())
    assert_as_dense(unpatch(model), inputs, IFTConfig(embedding_grad=True))
    assert "forward" not in vars(plain_head(model.get_base_model()))


def test_policy_losses():
    """Any function of the log-probabilities: here a preference between two rows."""
    model, inputs = adapted("dora"), batch(rows=2)

    def loss(logprob, mask):
        return dpo_loss(logprob, mask, torch.zeros(2, device=mask.device), beta=0.3)

    logits = model(**inputs).logits[:, :-1].log_softmax(-1)
    target = inputs["labels"][:, 1:]
    mask = target != -100
    logprob = logits.gather(-1, target.clamp(min=0)[..., None])[..., 0] * mask
    expected = loss(logprob, mask)
    expected.backward()
    grads = gradients(model)
    got = step(patch(model), **inputs, loss=loss)
    assert_same_step(got, (expected.detach(), grads))


@pytest.mark.parametrize("rule", ["kth", "sample"])
def test_other_rules_of_the_first_pass(rule):
    model = patch(adapted())
    model(**batch(), ift=IFTConfig(rule=rule)).loss.backward()
    with pytest.raises(ValueError, match="rule 'soft': not supported with LoRA on the output head"):
        model(**batch(), ift=IFTConfig(rule="soft"))


def test_several_adapters_merged_and_off():
    model, inputs = adapted(), batch()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=HEAD, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    pristine, patched = copy.deepcopy(model), patch(model)
    for change in (
        lambda m: None,
        lambda m: m.base_model.set_adapter("second"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.delete_adapter("default"),
    ):
        for each in (pristine, patched):
            change(each)
        expected = pristine(**inputs).loss
        assert type(expected) is torch.Tensor and pristine(**inputs).logits is not None
        torch.testing.assert_close(patched(**inputs).loss, expected, rtol=1e-5, atol=1e-6)
    with patched.disable_adapter():
        torch.testing.assert_close(patched(**inputs).loss, make("llama")(**inputs).loss)
    base = patched.merge_and_unload()
    torch.testing.assert_close(patch(base)(**inputs).loss, expected, rtol=1e-5, atol=1e-6)


def test_a_patched_model_that_gets_adapters_is_patched_again():
    model, inputs = lora(patch(make("llama")), target_modules=HEAD), batch()
    with pytest.raises(RuntimeError, match="patch again"):
        model(**inputs)
    expected = step(adapted(), **inputs)
    assert_same_step(step(patch(model), **inputs), expected)
    assert not any("forward" in vars(m) for m in unpatch(model).get_base_model().lm_head.modules())


def test_16_bits_with_adapters_in_float32():
    model, inputs = lora(make("llama").bfloat16(), target_modules=HEAD), batch()
    (loss, grads), (ours, got) = step(model, **inputs), step(patch(model), **inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-2, atol=1e-2, check_dtype=False)
    assert_close(got, grads, tolerance=0.1)
    assert {g.dtype for n, g in got.items() if "lm_head" in n} == {torch.float32}
    patch(model, logits_dtype=torch.float32)
    torch.testing.assert_close(step(model, **inputs)[0], loss, rtol=1e-2, atol=1e-2,
                               check_dtype=False)  # fmt: skip


def test_checkpointing():
    model, inputs = adapted(), batch()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    expected = step(model, **inputs)
    assert_same_step(step(patch(model), **inputs), expected)


def test_the_norm_is_formed_row_by_row(monkeypatch):
    monkeypatch.setattr("ift.head_parts.NORM_ELEMENTS", 60)
    w, a, b = torch.randn(131, 20), torch.randn(3, 20), torch.randn(131, 3)
    torch.testing.assert_close(weight_norm(w, a, b, 0.7), (w + 0.7 * b @ a).norm(dim=1))


def test_a_head_that_is_not_patched_can_be_used():
    model, inputs = adapted().eval(), batch()
    del inputs["labels"]
    base = model.get_base_model()
    with head_ready(base), torch.no_grad():
        _, found = head_pass(base, base, inputs, lambda hidden, *_, **more: (hidden, more))
    hidden, more = found
    parts = head_parts(plain_head(base), hidden)
    z = hidden @ parts.weight.T + more["low_rank"][0] @ more["low_rank"][1].T
    torch.testing.assert_close(z, model(**inputs).logits, rtol=1e-4, atol=1e-4)


class AnyLinear(torch.nn.Linear):
    pass


def with_hook(model):
    model.base_model.model.lm_head.base_layer.register_forward_hook(lambda *_: None)
    return model


def with_another_lora_b(model):
    head = model.base_model.model.lm_head
    head.lora_B["default"] = AnyLinear(2, 131, bias=False)
    return model


def with_a_second_dora(first):
    model = adapted(first, target_modules=["lm_head"])
    config = peft.LoraConfig(target_modules=["lm_head"], use_dora=True, r=2)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    return model


REFUSED = {
    "dora with dropout": (lambda: adapted("dora", lora_dropout=0.1), "DoRA with lora_dropout"),
    "dora with lora_bias": (lambda: with_a_second_dora("bias"), "beside lora_bias"),
    "two doras": (lambda: with_a_second_dora("dora"), "as the last active adapter"),
    "another variant": (
        lambda: adapted(task_type="CAUSAL_LM", alora_invocation_tokens=[5]), "is a ALoraLinear",
    ),
    "hook": (lambda: with_hook(adapted()), "already replaced"),
    "lora_B": (lambda: with_another_lora_b(adapted()), "has a lora_B of .*AnyLinear"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    build, said = REFUSED[name]
    model = build()
    with pytest.raises(TypeError, match=said) as error:
        patch(model)
    assert type(model.get_base_model()).__name__ in str(error.value)


def test_what_is_refused_at_the_loss():
    model = patch(adapted())
    base = model.get_base_model()
    with pytest.raises(ValueError, match="^reference: not supported with LoRA"):
        frozen_head(model, **batch())
    with pytest.raises(ValueError, match="^gradient: expected 'exact' with low_rank"):
        patch(model, gradient="active")(**batch())
    unpatch(model)
    model = patch(adapted("dora", lora_dropout=0.1).eval())  # as accurate without dropout
    assert model(**batch()).loss.isfinite()
    with pytest.raises(TypeError, match="DoRA with lora_dropout"):
        model.train()(**batch())
    assert base is not None
