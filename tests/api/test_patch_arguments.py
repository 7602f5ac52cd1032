"""What caller and model's code pass to the loss: honoured as in transformers, or refused."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers as hf

from causal_lms import V, assert_same_step, batch, make, step
from ift.config import IFTConfig
from ift.dynamics import ValleyGuard
from ift.losses import SFTLoss, sft_loss
from ift.patching import patch, unpatch


def compare(model, inputs):
    plain = step(model, **inputs)
    assert_same_step(step(patch(model), **inputs), plain)


CALLER = {
    "another ignore_index": lambda b: {**b, "ignore_index": 7, "labels": b["labels"].clamp(min=7)},
    "ignored padding token": lambda b: {**b, "ignore_index": 0, "labels": b["input_ids"]},
    "ignored and counted": lambda b: {
        **b, "ignore_index": 5, "labels": b["input_ids"], "num_items_in_batch": torch.tensor(11),
    },
    "shifted, another ignore_index": lambda b: {
        **b, "ignore_index": 9, "shift_labels": b["input_ids"].roll(-1, 1),
    },
    "counted as a float": lambda b: {**b, "num_items_in_batch": 2.5},
    "unknown to the loss": lambda b: {**b, "label_smoothing": None, "something": 3},
}  # fmt: skip


@pytest.mark.parametrize("change", CALLER)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_arguments_of_the_caller(name, change):
    compare(make(name), CALLER[change](batch()))


class Changed(hf.LlamaForCausalLM):
    """A model whose code calls its loss function with other arguments than it was given."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        mask = kwargs.get("attention_mask")
        output = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(**type(self).given(input_ids, logits, labels, kwargs))
        return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def changed(given):
    kind = type("Changed", (Changed,), {"given": staticmethod(given)})
    return kind(make("llama").config).train()


def standard(logits, labels, **more):
    return {"logits": logits, "labels": labels, "vocab_size": V, **more}


MODELS = {
    "labels of their own positions": lambda ids, z, y, k: standard(z, y, shift_labels=y),
    "labels of their own positions alone": lambda ids, z, y, k: standard(z, None, shift_labels=y),
    "some tokens masked": lambda ids, z, y, k: standard(z, y.masked_fill(ids % 3 == 0, -100)),
    "shifted by itself": lambda ids, z, y, k: standard(
        z, y, shift_labels=torch.nn.functional.pad(y[:, 2:], (0, 2), value=-100)
    ),
    "an ignore_index of its own": lambda ids, z, y, k: standard(
        z, y.masked_fill(y == -100, 4), ignore_index=4
    ),
    "num_items dropped": lambda ids, z, y, k: standard(z, y),
    "num_items changed": lambda ids, z, y, k: standard(z, y, num_items_in_batch=5),
    "flattened labels of the same values": lambda ids, z, y, k: standard(
        z, None, shift_labels=torch.nn.functional.pad(y[:, 1:], (0, 1), value=-100).flatten()
    ),
}


@pytest.mark.parametrize("given", MODELS)
def test_arguments_of_the_model(given, caplog):
    inputs = {**batch(), "num_items_in_batch": 7}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            compare(unpatch(changed(MODELS[given])), inputs)
    twice = [r for r in caplog.records if "each forward runs twice" in r.getMessage()]
    assert len(twice) == 2 * (given in ("some tokens masked", "shifted by itself",
                                        "an ignore_index of its own"))  # fmt: skip


REFUSED = {
    "another vocabulary": (
        lambda ids, z, y, k: {**standard(z, y), "vocab_size": V - 1}, ValueError, "vocab_size"),
    "logits cut": (
        lambda ids, z, y, k: standard(z[:, :-1], None, shift_labels=y[:, 1:]),
        RuntimeError, "gives logits of shape"),
    "logits flattened": (
        lambda ids, z, y, k: standard(z.flatten(0, 1), None, shift_labels=y.flatten()),
        RuntimeError, "gives logits of shape"),
    "no labels": (
        lambda ids, z, y, k: standard(z, None, shift_labels=None), ValueError, "labels"),
}  # fmt: skip


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_be_honoured_is_refused(given):
    model = changed(REFUSED[given][0])
    with pytest.raises(REFUSED[given][1], match=REFUSED[given][2]):
        patch(model)(**batch())
    if given.startswith("logits"):  # the others cannot compute their own loss either
        with pytest.raises(REFUSED[given][1], match=f"Changed: {REFUSED[given][2]}"):
            patch(unpatch(model))


def test_a_loss_of_the_caller_counts_its_own_items():
    model = patch(make("llama"))
    with pytest.raises(ValueError, match="num_items_in_batch: expected None with loss"):
        model(**batch(), loss=lambda p, m: -p.sum(), num_items_in_batch=torch.tensor(3))


@pytest.mark.parametrize("held_by", ["module", "partial", "guard"])
def test_a_loss_gets_the_statistics_that_its_options_take(held_by):
    model = make("llama")
    ids = batch()
    with torch.no_grad():
        logp = model(**ids).logits[:, :-1].log_softmax(-1)
    target = ids["labels"][:, 1:]
    own = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    options = {"scaling": "deft", "z_loss": 0.1}
    lse = model(**ids).logits[:, :-1].logsumexp(-1).detach()
    wanted = sft_loss(own, target != -100, sum_sq=logp.exp().square().sum(-1), lse=lse, **options)
    loss = SFTLoss(**options) if held_by != "partial" else partial(sft_loss, **options)
    loss = ValleyGuard(loss) if held_by == "guard" else loss
    torch.testing.assert_close(patch(model)(**ids, loss=loss).loss, wanted, rtol=1e-5, atol=1e-5)


def test_an_option_that_a_later_transformers_has_is_refused_by_name(monkeypatch):
    from transformers.loss import loss_utils

    from ift import head_pass

    def fixed_cross_entropy(
        source, target, num_items_in_batch=None, ignore_index=-100, label_smoothing=None, **kwargs
    ):
        raise AssertionError

    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", fixed_cross_entropy)
    head_pass._loss_options.cache_clear()
    try:
        model = make("llama")
        monkeypatch.undo()
        monkeypatch.setattr(loss_utils, "fixed_cross_entropy", fixed_cross_entropy)
        head_pass._loss_options(loss_utils.ForCausalLMLoss)
        monkeypatch.undo()
        patch(model)(**batch())
        with pytest.raises(ValueError, match="label_smoothing: LlamaForCausalLM passes it"):
            model(**batch(), label_smoothing=0.1)
    finally:
        head_pass._loss_options.cache_clear()


def test_labels_that_change_with_every_forward_are_refused():
    count = iter(range(100))
    model = changed(lambda ids, z, y, k: standard(z, y.roll(next(count), 1)))
    with pytest.raises(RuntimeError, match="other targets to its loss function in every forward"):
        patch(model)


@pytest.mark.parametrize("given", ["some tokens masked", "labels of their own positions"])
def test_ift_refuses_labels_that_the_model_changes(given):
    model = patch(changed(MODELS[given]))
    with pytest.raises(RuntimeError, match="Changed: changes its labels before its loss"):
        model(**batch(), ift=IFTConfig(share_prompt=False))
    with pytest.raises(ValueError, match="ignore_index: expected -100 with ift"):
        model(**batch(), ignore_index=3, ift=IFTConfig())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device):
    expected = patch(make("gemma2"))(**batch(), ift=IFTConfig()).loss
    before, after = make("gemma2"), patch(make("gemma2"))
    inputs = batch()
    torch.set_default_device(device)
    try:
        for model in (patch(before), after):
            for options in ({}, {"rule": "soft"}, {"share_prompt": False}):
                loss = model(**inputs, ift=IFTConfig(**options)).loss
                assert loss.device.type == "cpu"
                if "rule" not in options:
                    torch.testing.assert_close(loss, expected)
            assert model(**inputs).loss.device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_first_losses_from_several_threads():
    """Of a model that could not be measured at patch; no dropout is switched off."""
    with torch.device("meta"):
        model = patch(make("gpt2", resid_pdrop=0.1))
    assert model._ift_patch.measured is None
    model.to_empty(device="cpu")
    model.load_state_dict(make("gpt2").state_dict())
    model.eval()
    inputs = batch()
    expected = make("gpt2").eval()(**inputs).loss
    start = threading.Barrier(4)

    def first(_):
        start.wait()
        return model(**inputs).loss

    with ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(first, range(4)))
    torch.testing.assert_close(losses, [expected] * 4)


def masked(labels):
    labels[labels % 3 == 0] = -100


def replaced(labels):
    labels[labels > 50] = 7


def filled(labels):
    labels.masked_fill_(labels == -100, 4)


class InPlace(Changed):
    """A model whose code changes the tensor that it was given: before its head, or after it."""

    def forward(self, input_ids=None, labels=None, shift_labels=None, **kwargs):
        change, late = type(self).given, type(self).late
        given = labels if shift_labels is None else shift_labels
        if given is not None and not late:
            change(given)
        mask = kwargs.get("attention_mask")
        output = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        logits = self.lm_head(output.last_hidden_state)
        if given is not None and late:
            change(given)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, V, shift_labels=shift_labels)
        return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", [masked, replaced, filled])
def test_labels_that_the_model_changes_in_place(change, late):
    kind = type("InPlace", (InPlace,), {"given": staticmethod(change), "late": late})
    for shifted in (False, True):
        inputs = batch()
        if shifted:
            inputs["shift_labels"] = inputs["labels"].roll(-1, 1)

        def own(inputs=inputs):
            return {name: value.clone() for name, value in inputs.items()}

        model = kind(make("llama").config)
        plain = step(model, **own())
        for _ in range(2):
            given = own()
            assert_same_step(step(patch(model), **given), plain)
            assert all(torch.equal(given[name], inputs[name]) for name in inputs)
        with torch.inference_mode():
            loss = model(**own(), skip_logits=True).loss
        torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="InPlace: changes its labels before its loss"):
        model(**batch(), ift=IFTConfig(share_prompt=False))


def test_positional_arguments_are_those_of_python():
    inputs = batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    expected = make("llama")(ids, labels=labels).loss
    for hide in (False, True):
        model = make("llama")
        if hide:
            forward = model.forward
            model.forward = lambda *args, _forward=forward, **kwargs: _forward(*args, **kwargs)
        torch.testing.assert_close(patch(model)(ids, labels=labels).loss, expected)
        torch.testing.assert_close(model(ids, None, None, None, None, labels).loss, expected)
        with pytest.raises(TypeError, match="too many positional arguments"):
            model(ids, *[None] * 20)
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            model(ids, input_ids=ids, labels=labels)


# --- logits_to_keep: a number, positions, positions of each row, a mask ---------------------------


def test_logits_to_keep_is_honoured_as_transformers_does():
    model, inputs = make("llama"), batch()
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    shifted = shifted[:, -5:].contiguous()
    plain = step(model, **inputs, shift_labels=shifted, logits_to_keep=5)
    fused = step(patch(model), **inputs, shift_labels=shifted, logits_to_keep=5)
    assert_same_step(fused, plain, 1.3e-6, 1e-5)
    with pytest.raises(ValueError, match="labels: expected one per hidden state"):
        model(**inputs, logits_to_keep=5)


KEPT = {
    "positions": torch.tensor([0, 4, 9]),
    "positions of each row": torch.tensor([[0, 4, 9], [1, 2, 3], [8, 7, 7]]),
    "a mask": torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.4,
    "as many as labels": torch.arange(12).flip(0).expand(3, 12),
}


@pytest.mark.parametrize("kept", KEPT)
def test_logits_to_keep_as_a_tensor(kept):
    keep, inputs = KEPT[kept], batch()
    targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)[..., None]
    shifted = hf.modeling_utils.slice_logits_to_keep(targets, keep)[..., 0].contiguous()
    given = {**inputs, "shift_labels": shifted, "logits_to_keep": keep}
    model = make("llama")
    plain = step(model, **given)
    assert_same_step(step(patch(model), **given), plain, 1.3e-6, 1e-5)
    assert model.ift_metrics["tokens"] == (shifted != -100).sum()
    del given["shift_labels"]
    with pytest.raises(ValueError, match="shift_labels: expected .*LlamaForCausalLM"):
        model(**given)
    with pytest.raises(ValueError, match="logits_to_keep: expected 0 with ift"):
        model(**inputs, logits_to_keep=keep, ift=IFTConfig())
