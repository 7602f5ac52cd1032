"""A patched forward that something replaced, wrapped or copied: `ift=` is never ignored."""

import copy
import functools
import types

import pytest
import torch
from torch.nn.utils import parametrize

from causal_lms import assert_same_step, batch, make, step
from ift.config import IFTConfig
from ift.patching import patch, unpatch

accelerate = pytest.importorskip("accelerate")
CONFIG = IFTConfig(lam=0.9)


@pytest.fixture(autouse=True)
def no_accelerator_of_others():
    """Its state is one for the process: a trainer of another test would fix the precision."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def class_forward(model):
    model.forward = types.MethodType(type(model).forward, model)


def lambda_of_the_class(model):
    forward = type(model).forward
    model.forward = lambda **kwargs: forward(model, **kwargs)


def decorated(forward):
    @functools.wraps(forward)
    def outer(*args, **kwargs):
        return forward(*args, **kwargs)

    return outer


def wrapped_by_a_decorator(model):
    model.forward = decorated(type(model).forward.__get__(model))


def deleted(model):
    del model.forward


LOST = [class_forward, lambda_of_the_class, wrapped_by_a_decorator, deleted]


@pytest.mark.parametrize("lose", LOST)
def test_a_lost_patch_is_noticed_and_patching_again_works(lose):
    model, inputs = patch(make("llama")), batch()
    sft, ift = step(model, **inputs), step(model, **inputs, ift=CONFIG)
    lose(model)
    for argument in ({"ift": CONFIG}, {"skip_logits": True}, {"loss": lambda p, m: p.sum()}):
        with pytest.raises(RuntimeError, match=f"{next(iter(argument))}: .*did not run"):
            model(**inputs, **argument)
    assert_same_step(step(model, **inputs), sft)  # the same loss with logits
    assert model(**inputs).logits is not None
    patch(model)
    assert model(**inputs).logits is None
    assert_same_step(step(model, **inputs), sft)
    assert_same_step(step(model, **inputs, ift=CONFIG), ift)
    unpatch(model)
    assert "_ift_patch" not in model.__dict__
    assert model(**inputs).logits is not None


def hidden_wrapper(model):
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def shown_wrapper(model):
    model.forward = decorated(model.forward)


def mixed_precision(model):
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


@pytest.mark.parametrize("wrap", [hidden_wrapper, shown_wrapper, mixed_precision])
def test_a_wrapper_around_the_patch(wrap):
    model, inputs = patch(make("llama")), batch()
    sft, ift = step(model, **inputs), step(model, **inputs, ift=CONFIG)
    wrap(model)
    again = {"rtol": 0.1, "atol": 0.0} if wrap is mixed_precision else {}
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).loss, sft[0], **again)
        torch.testing.assert_close(model(**inputs, ift=CONFIG).loss, ift[0], **again)
        assert model(**inputs).logits is None
        patch(model)  # at most one more around the wrapper
    unpatch(model)
    assert model(**inputs).logits is not None
    torch.testing.assert_close(model(**inputs).loss, sft[0], **again)
    with pytest.raises(RuntimeError, match="ift: "):
        model(**inputs, ift=CONFIG)
    patch(model)
    torch.testing.assert_close(model(**inputs, ift=CONFIG).loss, ift[0], **again)


def test_accelerate_takes_its_wrapper_off_and_the_patch_stays():
    model, inputs = patch(make("llama")), batch()
    ift = step(model, **inputs, ift=CONFIG)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    for _ in range(2):
        prepared = accelerator.prepare(model)
        model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert_same_step(step(model, **inputs, ift=CONFIG), ift)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert_same_step(step(other, **inputs, ift=CONFIG), ift)
    for each in (model, other):
        assert "forward" not in unpatch(each).__dict__


def test_accelerate_prepares_before_the_patch():
    model, inputs = make("llama"), batch()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = patch(accelerator.prepare(model))
    expected = step(prepared, **inputs, ift=CONFIG)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    # The autocast below the patch stays.
    assert_same_step(step(model, **inputs, ift=CONFIG), expected)
    assert patch(model)(**inputs).logits is None


def scale(module, args, output):
    return output / 3.0


HOOKS = {
    "forward": lambda head: head.register_forward_hook(scale),
    "pre": lambda head: head.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,)),
    "full backward": lambda head: head.register_full_backward_hook(
        lambda m, grads, _: (grads[0] * 3.0,)
    ),
    "watching": lambda head: head.register_forward_hook(lambda m, args, output: None),
}


@pytest.mark.parametrize("when", ["before", "after patch", "after a loss"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_head_are_seen_whenever_they_come_and_go(hook, when):
    model, inputs = make("llama"), batch()
    plain = step(model, **inputs)
    handle = HOOKS[hook](model.lm_head)
    expected = step(model, **inputs)
    if when != "before":
        handle.remove()
    patch(model)
    if when == "after a loss":
        assert_same_step(step(model, **inputs), plain)
    if when != "before":
        handle = HOOKS[hook](model.lm_head)
    assert_same_step(step(model, **inputs), expected)
    handle.remove()
    assert_same_step(step(model, **inputs), plain)


class Half(torch.nn.Module):
    def forward(self, weight):
        return weight * 0.5


def test_parametrizations_of_the_head_are_seen_at_every_call():
    model, inputs = make("llama"), batch()
    patch(model)
    plain = step(model, **inputs)[0]
    for register in (
        lambda head: parametrize.register_parametrization(head, "weight", Half()),
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
    ):
        reference = make("llama").eval()
        register(reference.lm_head)
        model = patch(make("llama")).eval()
        model(**inputs)
        register(model.lm_head)
        assert_same_step(step(model, **inputs), step(reference, **inputs))
    assert plain == step(patch(make("llama")), **inputs)[0]


def test_hooks_that_want_the_gradient_of_logits_are_refused():
    model = make("llama")
    model.lm_head.register_full_backward_pre_hook(lambda m, grads: grads)
    with pytest.raises(TypeError, match="LlamaForCausalLM has a full_backward_pre_hook"):
        patch(model)
    model = patch(make("llama"))
    model.lm_head.register_full_backward_pre_hook(lambda m, grads: grads)
    with pytest.raises(TypeError, match="LlamaForCausalLM has a full_backward_pre_hook"):
        model(**batch())


@pytest.mark.parametrize("part", ["the model", "a model around it", "a copy"])
def test_replicas_of_data_parallel_are_refused_at_the_first_call(part):
    model = patch(make("llama"))
    if part == "a copy":
        model = copy.deepcopy(model)
    inside = torch.nn.Sequential(model) if part == "a model around it" else model

    def replicate():  # as torch.nn.parallel.replicate does for each device
        return [module._replicate_for_data_parallel() for module in inside.modules()]

    with pytest.raises(RuntimeError, match="LlamaForCausalLM: torch.nn.DataParallel"):
        replicate()
    unpatch(model)
    assert len(replicate()) == len(list(inside.modules()))


def test_a_quantized_head_is_refused_by_its_weight():
    class Quantized(torch.Tensor):
        pass

    Quantized.__module__ = "torchao.quantization"
    model = make("llama")
    weight = model.lm_head.weight.detach().as_subclass(Quantized)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(TypeError, match="LlamaForCausalLM has one of torchao.quantization"):
        patch(model)
    model = make("llama")
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(model.lm_head.weight.shape, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(TypeError, match="in torch.int8"):
        patch(model)


def test_peft_methods_that_keep_the_forward_are_refused_or_served():
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    inputs = batch()
    torch.manual_seed(1)
    model = peft.get_peft_model(make("llama"), config)
    with pytest.raises(TypeError, match="AdaptionPromptModel has kept the forward of Llama"):
        patch(model)
    expected = step(model.train(), **inputs)
    torch.manual_seed(1)
    model = peft.get_peft_model(patch(make("llama")), config).train()
    assert_same_step(step(model, **inputs), expected)
    assert model(**inputs, ift=CONFIG).loss != expected[0]
    assert model(**inputs).logits is None


@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_peft_adapters_with_and_without_a_saved_head(saved):
    peft = pytest.importorskip("peft")

    def config(save):
        return peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=save, init_lora_weights=False
        )

    torch.manual_seed(0)
    model = peft.get_peft_model(make("llama"), config(saved), adapter_name="a")
    model.add_adapter("b", config(None))
    model.train()
    inputs, expected = batch(), {}
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["a"].weight.mul_(1.5)
    for name in "ab":
        model.set_adapter(name)
        expected[name] = step(model, **inputs)
    assert expected["a"][0] != expected["b"][0]
    for first in "ab":
        model.set_adapter(first)
        patch(model)
        for name in "abab":
            model.set_adapter(name)
            assert model(**inputs).logits is None
            assert_same_step(step(model, **inputs), expected[name])
        with model.disable_adapter():
            torch.testing.assert_close(model(**inputs).loss, make("llama")(**inputs).loss)
        assert len(list(map(lambda _: float(model(**inputs).loss), range(3)))) == 3  # noqa: C417
        unpatch(model)
