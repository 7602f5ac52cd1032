"""`add_fused_forward`: log-probabilities of the labels from a patched model, for any caller."""

import copy
import importlib.util
import inspect
import pickle
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers.utils import ModelOutput

import dense
import ift
from causal_lms import assert_close, batch, gradients, lora, make
from ift.integrations import fused_head
from ift.integrations.fused_head import FusedHeadOutput, add_fused_forward

FIELDS = {
    "entropy": "entropy",
    "argmax": "is_top1",
    "mean_logit": "mean_logits",
    "sum_sq": "log_sum_sq_probs",
}


def fused(name="llama", outputs=("logprob",), temperature=1.0, **overrides):
    model = ift.patch(make(name, **overrides))
    add_fused_forward(model, outputs, temperature)
    return model


def of_logits(model, inputs, temperature):
    """Statistics of logits / temperature (B, T - 1), and the shifted labels."""
    labels = inputs["labels"][:, 1:]
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    return dense.oracle.statistics(model(**rest).logits[:, :-1] / temperature, labels), labels


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "phi"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_field_is_that_of_the_logits(architecture, temperature):
    inputs, outputs = batch(), ("logprob", *FIELDS)
    right, labels = of_logits(make(architecture), inputs, temperature)
    mask = labels != -100
    model = fused(architecture, outputs, temperature)
    out = model(**inputs, fused_lm_head=True)
    expected = {
        "log_probs": right["logprob"],
        "entropy": right["entropy"],
        "mean_logits": right["mean_logit"],
        "log_sum_sq_probs": torch.where(mask, right["sum_sq"], 1).log(),
        "loss": -right["logprob"].sum() / mask.sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.is_top1, (right["argmax"] == labels) & mask)
    assert torch.equal(out.label_mask, mask) and out.aux_loss is None
    assert out.entropy.requires_grad
    assert not (out.mean_logits.requires_grad or out.log_sum_sq_probs.requires_grad)


@pytest.mark.parametrize(
    "outputs",
    [("logprob",), ("logprob", "entropy"), ("entropy", "logprob", "sum_sq"),
     ("logprob", "mean_logit"), ("argmax", "logprob")],
    ids=" ".join,
)  # fmt: skip
def test_what_is_not_asked_for_is_none(outputs):
    out = fused(outputs=outputs)(**batch(), fused_lm_head=True)
    assert isinstance(out, FusedHeadOutput) and isinstance(out, ModelOutput)
    for name, field in FIELDS.items():
        assert (getattr(out, field) is None) == (name not in outputs), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "granite"])
def test_gradients_of_log_probs_and_entropy(architecture):
    inputs, seen = batch(), []
    for ours in (False, True):
        if ours:
            model = fused(architecture, ("logprob", "entropy"), 0.8)
            out = model(**inputs, fused_lm_head=True)
            log_probs, entropy = out.log_probs, out.entropy
        else:
            model = make(architecture)
            right, _ = of_logits(model, inputs, 0.8)
            log_probs, entropy = right["logprob"], right["entropy"]
        weights = torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)
        ((log_probs * weights).sum() + 0.2 * entropy.sum()).backward()
        seen.append(gradients(model))
    assert_close(seen[1], seen[0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_a_call_replaces_the_models(temperature):
    inputs = batch()
    given = fused(temperature=temperature)(**inputs, fused_lm_head=True)
    model = fused(temperature=1.7)
    torch.testing.assert_close(
        model(**inputs, fused_lm_head=True, temperature=temperature).log_probs, given.log_probs
    )
    add_fused_forward(model, ("logprob", "entropy"), temperature)  # replaced, not wrapped again
    out = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, given.log_probs)
    assert out.entropy is not None
    assert ift.unpatch(model).__dict__.get("forward") is None


def test_within_a_support():
    """Every field over the ids of the support, by arguments and as ids of a sampler."""
    inputs, outputs = batch(), ("logprob", "entropy", "argmax")
    labels, support = inputs["labels"][:, 1:], ift.Support(top_k=4, top_p=0.9)
    logits = make("gemma2")(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1] / 0.7
    mask, best = labels != -100, logits.topk(4)
    p = best.values.softmax(-1)
    inside = torch.zeros_like(logits, dtype=torch.bool)
    inside.scatter_(-1, best.indices, p.cumsum(-1) - p < 0.9)
    inside.scatter_(-1, labels.clamp(min=0)[..., None], True)
    logp = logits.masked_fill(~inside, -torch.inf).log_softmax(-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    model = ift.patch(make("gemma2"))
    add_fused_forward(model, outputs, 0.7, support)
    out = model(**inputs, fused_lm_head=True)
    right = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs, right * mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.entropy, entropy * mask, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.is_top1, (logp.argmax(-1) == labels) & mask)
    assert not torch.allclose(out.log_probs, model(**inputs, fused_lm_head=True, support=None)[1])

    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)
    places = torch.where(inside, torch.arange(logits.shape[-1]), -100).sort(-1).values[..., -5:]
    ids = torch.nn.functional.pad(places, (0, 0, 0, 1), value=-100)
    rest = {k: v for k, v in inputs.items() if k != "labels"} | {"fused_lm_head": True}
    again = model(**rest, shift_labels=shifted, support=ids)
    torch.testing.assert_close(again.log_probs[:, :-1], out.log_probs)
    with pytest.raises(ValueError, match="support: expected an ift.Support beside labels"):
        model(**inputs, fused_lm_head=True, support=ids)
    with pytest.raises(ValueError, match="support: expected one with top_k"):
        model(**inputs, fused_lm_head=True, support=ift.Support(top_p=0.9))
    with pytest.raises(TypeError, match="support: expected an ift.Support or None"):
        add_fused_forward(model, outputs, 0.7, 5)
    with pytest.raises(ValueError, match="support: expected None with 'mean_logit'"):
        add_fused_forward(model, ("logprob", "mean_logit"), 0.7, support)
    with pytest.raises(ValueError, match="gradient: expected 'exact' with support"):
        add_fused_forward(ift.patch(model, gradient="active"), outputs, 0.7, support)


def test_shifted_labels_packed_rows_and_padding_are_the_same_rows():
    inputs = batch(rows=3, length=10)
    model = fused(outputs=("logprob", "entropy"))
    out = model(**inputs, fused_lm_head=True)
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    rest = {k: v for k, v in inputs.items() if k != "labels"}
    again = model(**rest, shift_labels=shifted, fused_lm_head=True)
    assert again.log_probs.shape == (3, 10)
    torch.testing.assert_close(again.log_probs[:, :-1], out.log_probs)
    keep = inputs["attention_mask"].bool()
    packed = model(
        input_ids=inputs["input_ids"][keep][None],
        position_ids=(inputs["attention_mask"].cumsum(-1) - 1)[keep][None],
        shift_labels=shifted[keep][None],
        fused_lm_head=True,
    )
    torch.testing.assert_close(packed.log_probs[0], again.log_probs[keep], rtol=1e-5, atol=1e-5)
    left = {k: torch.stack([r.roll(int(n)) for r, n in zip(v, (~keep).sum(1), strict=True)])
            for k, v in inputs.items()}  # fmt: skip
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    moved = model(**left, position_ids=positions, fused_lm_head=True)
    torch.testing.assert_close(moved.log_probs.sum(-1), out.log_probs.sum(-1))


def test_a_mixture_adds_its_auxiliary_loss():
    inputs = batch()
    expected = make("mixtral")(**inputs)
    out = fused("mixtral")(**inputs, fused_lm_head=True)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)


def test_other_calls_are_as_before():
    inputs, model = batch(), fused()
    plain = ift.patch(make("llama"))
    for options in ({}, {"ift": ift.IFTConfig(lam=0.9)}, {"skip_logits": False}):
        torch.testing.assert_close(model(**inputs, **options).loss, plain(**inputs, **options).loss)
    assert model(input_ids=inputs["input_ids"]).logits is not None
    made = model.generate(inputs["input_ids"][:1], max_new_tokens=2, do_sample=False)
    assert made.shape == (1, 14)
    parameters = inspect.signature(model.forward).parameters
    assert {"fused_lm_head", "ift", "labels", "input_ids"} <= parameters.keys()
    assert "self" not in parameters


# --- It is not lost ------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    def of(precision):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, mixed_precision=precision)

    yield of
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_accelerate_wraps_and_unwraps_it(accelerator, architecture, precision):
    inputs, model = batch(), fused(architecture, ("logprob", "entropy"), 0.9)
    config = ift.IFTConfig(lam=0.9)
    right = model(**inputs, fused_lm_head=True).log_probs
    loss = model(**inputs, ift=config).loss
    accelerate = accelerator(precision)
    prepared = accelerate.prepare(model)
    close = {"rtol": 0.1, "atol": 0.5} if precision == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
    for model in (prepared, accelerate.unwrap_model(prepared)):
        found = model(**inputs, fused_lm_head=True).log_probs
        torch.testing.assert_close(found, right, **close)
    model = accelerate.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).log_probs, right)
    torch.testing.assert_close(model(**inputs, ift=config).loss, loss)
    assert model(**inputs).logits is None  # the patch is there, too
    ift.unpatch(model)
    assert model(**inputs).logits is not None


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_model_that_accelerate_prepared_before(accelerator, precision):
    """As TRL's reference models are, which then run under its autocast."""
    inputs, accelerate = batch(), accelerator(precision)
    right = fused()(**inputs, fused_lm_head=True).log_probs
    model = accelerate.prepare(make("llama"))
    add_fused_forward(ift.patch(model))
    close = {"rtol": 0.1, "atol": 0.5} if precision == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
    found = model(**inputs, fused_lm_head=True).log_probs
    assert torch.equal(found, right) == (precision == "no")
    torch.testing.assert_close(found, right, **close)
    model = accelerate.unwrap_model(model, keep_fp32_wrapper=False)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).log_probs, right, **close)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_copies_and_pickles_have_it(copied, architecture):
    inputs, model = batch(), fused(architecture, ("logprob", "entropy"), 0.5)
    right = model(**inputs, fused_lm_head=True)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    out = other(**inputs, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, right.log_probs)
    torch.testing.assert_close(out.entropy, right.entropy)
    assert other(**inputs, ift=ift.IFTConfig()).logits is None


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
def test_peft_models_pass_it_on(saved):
    inputs, options = batch(), {"modules_to_save": list(saved), "task_type": "CAUSAL_LM"}
    model = lora(make("llama"), target_modules=["q_proj"], **options)
    right, _ = of_logits(model, inputs, 0.7)
    ift.patch(model, gradient="exact")
    add_fused_forward(model, ("logprob",), 0.7)
    out = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, right["logprob"], rtol=1e-5, atol=1e-5)


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("entropy",),), 'outputs: expected "logprob" among them'),
        ((("logprob", "lse"),), "outputs: expected one of"),
        ((("logprob",), 0.0), "temperature: expected a positive number"),
        ((("logprob",), float("nan")), "temperature: expected a positive number"),
    ],
)
def test_options_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_fused_forward(ift.patch(make("llama")), *arguments)


def test_an_unpatched_model_is_refused():
    for model in (make("llama"), ift.unpatch(ift.patch(make("gpt2"))), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"model: expected one patched.*{type(model).__name__}"):
            add_fused_forward(model)


@pytest.mark.parametrize("name", ["ift", "loss", "skip_logits"])
def test_what_it_does_not_do_is_refused(name):
    value = {"ift": ift.IFTConfig(), "loss": lambda *_: 0, "skip_logits": True}[name]
    with pytest.raises(ValueError, match=f"{name}: expected None with fused_lm_head"):
        fused()(**batch(), fused_lm_head=True, **{name: value})


def test_calls_without_labels_or_keywords_are_refused():
    model, inputs = fused(), batch()
    with pytest.raises(ValueError, match=r"labels: expected \(B, T\) token ids with fused_lm_head"):
        model(input_ids=inputs["input_ids"], fused_lm_head=True)
    with pytest.raises(TypeError, match="fused_lm_head: expected keyword arguments only"):
        model(inputs["input_ids"], labels=inputs["labels"], fused_lm_head=True)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        model(**inputs, fused_lm_head=True, temperature=-1.0)
    with pytest.raises(ValueError, match="use_cache: expected False or None with fused_lm_head"):
        model(**inputs, fused_lm_head=True, use_cache=True)
    model(**inputs, fused_lm_head=True, use_cache=False)


def test_it_needs_no_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # an import of it raises
    spec = importlib.util.spec_from_file_location("fused_head_alone", fused_head.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    model = ift.patch(make("llama"))
    module.add_fused_forward(model)
    assert model(**batch(), fused_lm_head=True).log_probs.shape == (3, 11)
