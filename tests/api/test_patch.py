"""`ift.patch` against the same model's own path through full logits."""

import copy
import inspect
import io

import pytest
import torch
import transformers as hf
from torch import nn

import dense
from allocations import Allocations
from causal_lms import (
    ARCHITECTURES,
    V,
    assert_as_dense,
    assert_close,
    assert_same_step,
    batch,
    gradients,
    make,
    step,
)
from ift.config import IFTConfig
from ift.head_options import HeadOptions
from ift.head_pass import head_pass
from ift.input_embeddings import embedding_table
from ift.patching import original_forward, patch, unpatch
from ift.prefix import find_sharing
from ift.token_stats import token_stats
from ift_kernels import ActiveSet, record_active_sets
from ift_kernels.common import checks


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_those_of_the_logits(name, num_items):
    model, inputs = make(name), batch()
    if num_items is not None:
        inputs["num_items_in_batch"] = num_items
    plain, expected = model(**inputs), step(model, **inputs)
    fused = patch(model)(**inputs)
    assert fused.logits is None
    assert_same_step(step(model, **inputs), expected)
    # Neither logits nor, unless asked for, a cache that training would only pay for.
    assert set(fused.keys()) == set(plain.keys()) - {"logits", "past_key_values"}
    cached = model(**inputs, use_cache=True)
    assert set(cached.keys()) == set(plain.keys()) - {"logits"}


def test_the_gradient_of_the_head_is_chosen_at_patch():
    model, inputs = make(next(iter(ARCHITECTURES))), batch()
    _, exact = step(patch(model), **inputs)
    for given in (ActiveSet(threshold=0.0), None):  # None: stays as it is
        patch(model, gradient=given)
        model.zero_grad()
        with record_active_sets() as report:
            _, got = step(model, **inputs)
        assert len(report) == 1
        assert_close(got, exact)
    with record_active_sets() as report:
        model(**inputs, ift=IFTConfig()).loss.backward()
    assert len(report) == 1
    for given, frozen, calls in (("active", True, 1), ("exact", True, 0), ("active", False, 1)):
        patch(model, gradient=given)
        model.get_output_embeddings().requires_grad_(not frozen)
        with record_active_sets() as report:
            model(**inputs).loss.backward()
        assert len(report) == calls
    with pytest.raises(ValueError, match="gradient: expected one of"):
        patch(model, gradient="some")


def test_token_logprobs_are_those_of_the_logits(name):
    model, inputs = make(name), batch()
    logits = model(**inputs).logits.float()
    patch(model)
    model(**inputs)  # measures the transform
    target = torch.randint(V, inputs["input_ids"].shape)
    labels = inputs.pop("labels")
    forward = type(model).forward.__get__(model)
    callback = token_stats(target, model._ift_patch.transform, HeadOptions())
    _, stats = head_pass(model, forward, inputs, callback)
    expected = dense.oracle.statistics(logits, target)
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(getattr(stats, name), expected[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.argmax, expected["argmax"])
    valid = labels[:, 1:] != -100
    correct = ((stats.argmax[:, :-1] == labels[:, 1:]) & valid).sum()
    assert model.ift_metrics["tokens"] == valid.sum()
    assert model.ift_metrics["correct"] == correct


def test_padding_on_the_left(name):
    model, inputs = make(name), {k: v.flip(1) for k, v in batch().items()}
    plain = step(model, **inputs)
    assert_same_step(step(patch(model), **inputs), plain)


def test_labels_that_are_shifted_already():
    model, inputs = make("llama"), batch()
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=3)  # a last target too
    plain = step(model, **inputs, shift_labels=shifted)
    assert_same_step(step(patch(model), **inputs, shift_labels=shifted), plain, 1.3e-6, 1e-5)
    inputs.pop("labels")
    alone = model(**inputs, shift_labels=shifted, skip_logits=True)
    torch.testing.assert_close(alone.loss, plain[0])


def test_no_targets_at_all_give_a_zero_that_can_be_differentiated(name):
    model, inputs = patch(make(name)), batch()
    inputs["labels"].fill_(-100)
    for extra in ({}, {"num_items_in_batch": torch.tensor(0)}):
        loss, grads = step(model, **inputs, **extra)
        if name != "mixtral":  # whose auxiliary loss remains
            assert loss == 0
            assert all(g is None or not g.any() for g in grads.values())
        assert torch.isfinite(loss)


def test_tuples_and_positional_arguments():
    model, inputs = make("llama"), batch()
    plain = model(**inputs, return_dict=False, output_hidden_states=True, use_cache=False)
    patch(model)
    fused = model(
        inputs["input_ids"],
        inputs["attention_mask"],
        labels=inputs["labels"],
        return_dict=False,
        output_hidden_states=True,
        use_cache=False,
    )
    assert isinstance(fused, tuple) and len(fused) == len(plain) - 1  # no logits
    torch.testing.assert_close(fused[0], plain[0])
    torch.testing.assert_close(fused[1], plain[2])  # hidden states


def test_evaluation_and_generation_are_untouched(name):
    model, inputs = make(name).eval(), batch()
    prompt = {k: v[:, :4] for k, v in inputs.items() if k != "labels"}
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        plain, generated = model(**inputs), model.generate(**prompt, **options)
        patch(model)
        same = model(**inputs)
        assert torch.equal(same.logits, plain.logits) and torch.equal(same.loss, plain.loss)
        assert torch.equal(model.generate(**prompt, **options), generated)
        skipped = model(**inputs, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, plain.loss)
    model.train()
    assert model(**inputs, skip_logits=False).logits.shape[-1] == V
    assert model(**prompt).logits.shape[-1] == V


def state_of(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def test_unpatch_leaves_nothing(name):
    model, inputs = make(name), batch()
    model(**inputs)  # whatever the model itself notes in its first forward
    before, class_forward = state_of(model), type(model).forward
    patch(model)
    patch(model)  # a second time changes nothing
    model(**inputs).loss.backward()
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=inputs["input_ids"], skip_logits=True)
    unpatch(model)
    assert state_of(model) == before and type(model).forward is class_forward
    unpatch(model)  # nor does this
    assert model(**inputs).logits is not None


def test_unpatch_restores_a_forward_that_was_there():
    model, inputs = make("llama"), batch()
    calls = []
    own = type(model).forward.__get__(model)

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return own(*args, **kwargs)

    model.forward = forward
    patch(model)
    model(**inputs).loss.backward()
    assert calls
    unpatch(model)
    assert model.forward is forward


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_a_copy_is_patched_and_independent(duplicate):
    model, inputs = patch(make("gemma2")), batch()
    expected = model(**inputs).loss
    if duplicate == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    output = other(**inputs)
    assert output.logits is None
    assert torch.equal(output.loss, expected)
    assert "_ift_patch" not in unpatch(other).__dict__
    assert model(**inputs).logits is None


def test_what_is_inside_a_peft_model_is_patched():
    class Wrapper(nn.Module):  # as PEFT's: another module around, the causal LM within reach
        def __init__(self, model):
            super().__init__()
            self.model, self.get_base_model = model, lambda: model

        def forward(self, **kwargs):
            return self.model(**kwargs)

    wrapper = Wrapper(make("llama"))
    assert patch(wrapper) is wrapper and "forward" not in wrapper.__dict__
    assert wrapper(**batch()).logits is None
    assert unpatch(wrapper)(**batch()).logits is not None


def test_signature_gains_its_arguments():
    model = make("llama")
    before = list(inspect.signature(model.forward).parameters)
    patch(model)
    expected = [*before[:-1], "ift", "skip_logits", "loss", before[-1]]
    assert list(inspect.signature(model.forward).parameters) == expected
    method = model.forward.__func__  # what accelerate takes apart and binds again
    assert list(inspect.signature(method).parameters) == ["self", *expected]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    model, inputs = make(name), batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, expected = step(model, **inputs)
    assert_close(step(patch(model), **inputs)[1], expected)


def test_autocast_is_as_close_to_float32_as_the_logits_path(name):
    model, inputs = make(name), batch()
    plain, expected = step(model, **inputs)

    def error(output, grads):
        pairs = [(grads[n], g) for n, g in expected.items() if g is not None]
        return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max()

    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(**inputs)
    theirs.loss.backward()
    their_error = error(theirs, gradients(model))
    patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(**inputs)
    ours.loss.backward()
    assert ours.loss.dtype == torch.float32
    assert abs(ours.loss - plain) <= 2 * abs(theirs.loss - plain) + 1e-2
    assert error(ours, gradients(model)) <= 2 * their_error


@pytest.mark.parametrize("rule", [None, "greedy", "sample", "soft"])
def test_no_logits_are_ever_made(rule, monkeypatch):
    vocabulary, rows, length = 20011, 4, 256
    options = {"max_position_embeddings": length, "attn_implementation": "sdpa"}
    model = make("llama", vocab_size=vocabulary, **options)
    inputs = batch(rows, length, prompt=64, vocabulary=vocabulary)
    logits = 4 * int((inputs["labels"][:, 1:] != -100).sum()) * vocabulary
    table = 4 * 32 * vocabulary
    with Allocations() as plain:
        step(model, **inputs)
    assert plain.largest >= logits
    patch(model)
    if rule is None:
        monkeypatch.setitem(checks.DEFAULT_WORKSPACE, "cpu", 1 << 20)
    else:
        inputs["ift"] = IFTConfig(workspace=1 << 20, rule=rule)
    with Allocations() as ours:
        step(model, **inputs)
    assert ours.largest <= table < logits // 20  # the gradient of the head is the largest


# --- refusals: never silently another loss -------------------------------------------------------


class LoraLikeHead(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1.0


def refuse_at_patch(model, match):
    with pytest.raises(TypeError, match=match):
        patch(model)
    assert "forward" not in model.__dict__


def test_heads_that_are_not_plain_are_refused():
    model = make("llama")
    model.lm_head = LoraLikeHead(32, V)
    refuse_at_patch(model, "LlamaForCausalLM has .*LoraLikeHead")
    model = make("llama")
    model.lm_head.forward = lambda x: x
    with pytest.raises(TypeError, match="forward of the output head of LlamaForCausalLM"):
        patch(model)
    refuse_at_patch(make("llama").model, "LlamaModel has none")
    refuse_at_patch(nn.Linear(2, 2), "Linear has none")


def test_a_head_replaced_after_patching_is_noticed():
    model, inputs = patch(make("llama")), batch()
    model.resize_token_embeddings(V + 3)
    with pytest.raises(RuntimeError, match="replaced after ift.patch"):
        model(**inputs)
    patch(model)
    assert model(**inputs).logits is None
    model.lm_head = LoraLikeHead(32, V)
    with pytest.raises(TypeError, match="LoraLikeHead"):
        model(**inputs)


class Altered(hf.LlamaForCausalLM):
    """A model whose code does `change` to what its head returns."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = type(self).change(self, self.lm_head(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=V)
        return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "change",
    {
        "vocabulary sliced": lambda self, z: z[..., :-3],
        "a column masked": lambda self, z: z.index_fill(-1, torch.tensor([5]), -1e9),
        "a bias added": lambda self, z: z + torch.arange(z.shape[-1]),
        "another cap": lambda self, z: z.clamp(-10, 10),
        "softmax": lambda self, z: z.log_softmax(-1),
    }.items(),
    ids=lambda item: item[0],
)
def test_code_after_the_head_that_is_not_scale_and_softcap_is_refused(change):
    model = type("Altered", (Altered,), {"change": change[1]})(make("llama").config)
    with pytest.raises(RuntimeError, match="Altered: expected its logits to be scale"):
        patch(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("capped", [False, True])
def test_an_unknown_scale_and_softcap_are_measured(capped):
    def change(self, z):
        return 7.3 * torch.tanh(z * 0.31 / 7.3) if capped else z * 0.31

    model = type("Altered", (Altered,), {"change": change})(make("llama").config)
    plain = step(model, **batch())
    assert_same_step(step(patch(model), **batch()), plain, 1.3e-6, 1e-5)


def test_other_losses_and_kinds_of_model_are_refused_by_name():
    small = {"vocab_size": V, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4}
    small |= {"decoder_ffn_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 4}
    small |= {"encoder_ffn_dim": 32}
    two_parts = TypeError, "has an encoder and a decoder"
    for model, (kind, match) in {
        hf.BartForCausalLM(hf.BartConfig(**small)): (RuntimeError, "computes its own loss"),
        hf.BartForConditionalGeneration(hf.BartConfig(**small)): two_parts,
        hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=V, d_model=32, num_layers=1)
        ): two_parts,
    }.items():
        before = state_of(model)
        with pytest.raises(kind, match=f"{type(model).__name__}.*{match}"):
            patch(model)
        assert state_of(model) == before


def test_a_custom_loss_function_is_refused_and_kept():
    model = make("llama")
    model.loss_function = custom = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(RuntimeError, match="expected the loss function ForCausalLMLoss"):
        patch(model)
    assert model.loss_function is custom
    del model._loss_function
    patch(model)
    model.loss_function = custom
    with pytest.raises(RuntimeError, match="expected the loss function ForCausalLMLoss"):
        model(**batch())
    assert unpatch(model).loss_function is custom


def test_an_error_inside_leaves_no_trace():
    model, inputs = patch(make("llama")), batch()
    good = model(**inputs).loss
    before = dict(model.__dict__)
    labels = inputs["labels"].clone()
    labels[0, -1] = V
    with pytest.raises(ValueError, match="target"):
        model(**{**inputs, "labels": labels})
    assert dict(model.__dict__) == before
    with torch.no_grad():
        assert model.eval()(**inputs).logits.shape[-1] == V  # no question left behind
    assert torch.equal(model.train()(**inputs).loss, good)


@pytest.mark.parametrize("trial", ["patch", "shared prompt", "rule soft"])
def test_trials_leave_the_random_state(trial):
    """Of a model that draws random numbers in evaluation, too."""
    model, inputs = make("llama"), batch()

    def draws(module, args):
        torch.rand(3)

    if trial == "patch":
        model.model.register_forward_pre_hook(draws)
    before = torch.get_rng_state()
    patch(model)
    if trial != "patch":
        module = model.model if trial == "shared prompt" else model.model.embed_tokens
        model(**inputs, ift=IFTConfig(rule="soft", lam=0.0))
        module.register_forward_pre_hook(draws)
        if trial == "shared prompt":
            find_sharing(model, original_forward(model), inputs["input_ids"].device)
        else:
            embedding_table(model)
    assert torch.equal(torch.get_rng_state(), before)


class Lookup(torch.nn.Module):
    """An input embedding without parameters."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", table.detach().clone())

    def forward(self, ids):
        return self.table[ids]


class Bare(torch.nn.Module):
    """One without buffers, too."""

    def forward(self, ids):
        return torch.sin(ids[..., None] * torch.arange(1, 33))


@pytest.mark.parametrize("kind", ["buffer", "bare"])
def test_input_embeddings_without_parameters(kind):
    model = make("llama")
    table = model.get_input_embeddings().weight
    model.set_input_embeddings(Lookup(table) if kind == "buffer" else Bare())
    assert_as_dense(model, batch(), None, IFTConfig())
