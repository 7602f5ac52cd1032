"""`ift.checking.compare`: what it finds, what it does not mistake for a fault, what it leaves."""

import pytest
import torch

import causal_lms
import ift
from bench.peers.naive_ift import naive_ift_loss
from ift.checking import compare
from ift.checking.naive import naive_ift

METHODS = {
    "sft": None,
    "two passes": ift.IFTConfig(share_prompt=False),
    "shared prompt": ift.IFTConfig(),
    "kth": ift.IFTConfig(rule="kth", k=3, objective="paper", embedding_grad=True),
    "soft": ift.IFTConfig(rule="soft", gamma=0.5, num_rows=7.0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_equal(name, method):
    found = compare(causal_lms.make(name), causal_lms.batch(), ift=METHODS[method])
    assert found.verdict == "equal", str(found)
    assert found.tokens == 21 and found.worst_parameter and found.errors["gradient"] > 0
    assert ("logprob" in found.errors) == (method == "sft")
    assert str(found).startswith(f"{found.model} {found.objective} (float32): equal, loss ")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    found = compare(causal_lms.make("llama").to(dtype), causal_lms.batch())
    assert found.verdict == "equal", str(found)
    assert found.tolerance == (1e-5 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("config", [v for v in METHODS.values() if v], ids=list(METHODS)[1:])
def test_reference_is_the_port_of_the_released_code(config):
    model, batch = causal_lms.make("llama").eval(), causal_lms.batch()
    ours = naive_ift(model, batch, config).loss
    if config.rule == "soft":  # which the released code does not have
        return
    options = {"rule": config.rule, "k": config.k, "objective": config.objective}
    port = naive_ift_loss(
        model, batch["input_ids"], batch["labels"], batch["attention_mask"], **options
    )
    torch.testing.assert_close(ours, port)


# A fault of each kind in the patched forward, and what names it.
def _scaled_loss(output):
    output.loss = output.loss * 1.001


def _detached(output):
    output.loss = output.loss.detach() + 0.5 * (output.loss - output.loss.detach())


def _auxiliary(output):
    output.loss = output.loss + 1e-3


@pytest.mark.parametrize(
    ("fault", "names"),
    [(_scaled_loss, "loss, gradient"), (_detached, "gradient"), (_auxiliary, "loss")],
)
def test_a_wrong_patch_is_found(monkeypatch, fault, names):
    model, batch = causal_lms.make("llama"), causal_lms.batch()
    forward = type(ift.patch(model).forward).__call__
    ift.unpatch(model)

    def wrong(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        fault(output)
        return output

    monkeypatch.setattr(type(ift.patch(causal_lms.make("llama")).forward), "__call__", wrong)
    found = compare(model, batch)
    assert (found.verdict, found.reason) == ("different", f"differs in {names}"), str(found)
    if "gradient" in names:
        assert found.worst_parameter in dict(model.named_parameters())


@pytest.mark.parametrize("config", [None, ift.IFTConfig(share_prompt=False)], ids=["sft", "ift"])
def test_float32_logits_are_compared_with_float32_logits(config):
    for name in ("llama", "gemma2"):
        model = ift.patch(causal_lms.make(name).to(torch.bfloat16), logits_dtype=torch.float32)
        hooks = dict(model.get_output_embeddings()._forward_hooks)
        result = compare(model, causal_lms.batch(), ift=config)
        assert result.verdict == "equal" and result.errors["loss"] < 1e-6, str(result)
        assert dict(model.get_output_embeddings()._forward_hooks) == hooks
        rounded = compare(ift.unpatch(model), causal_lms.batch(), ift=config)
        assert rounded.expected_loss != result.expected_loss
        if config is not None:
            same = compare(model, causal_lms.batch(), ift=config.replace(logits_dtype="float32"))
            assert same.expected_loss == result.expected_loss and same.loss == result.loss


def test_refusal_at_patch_is_a_result():
    model = causal_lms.make("llama")
    model.lm_head = type("Quantized", (torch.nn.Linear,), {"forward": lambda self, x: x})(32, 131)
    found = compare(model, causal_lms.batch())
    assert (found.verdict, found.refused_at) == ("refused", "patch")
    assert "Quantized" in found.reason and "refused at patch" in str(found)


def test_refusal_at_the_first_forward_is_a_result():
    batch = causal_lms.batch()
    found = compare(causal_lms.make("llama"), {**batch, "logits_to_keep": 5}, ift=ift.IFTConfig())
    assert (found.verdict, found.refused_at) == ("refused", "forward")
    assert found.reason.startswith("logits_to_keep: ")


def test_what_the_model_itself_does_not_take_raises():
    batch = causal_lms.batch()
    with pytest.raises(IndexError, match="out of range"):
        compare(causal_lms.make("llama"), {**batch, "input_ids": batch["input_ids"] + 1000})


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("config", [None, ift.IFTConfig()], ids=["sft", "ift"])
def test_the_model_is_as_it_was(patched, config):
    model, batch = causal_lms.make("llama"), causal_lms.batch()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[0].eval()
    if patched:
        ift.patch(model)
    before = [dict(vars(module)) for module in model.modules()]
    state = torch.get_rng_state()
    assert compare(model, batch, ift=config).verdict == "equal"
    assert torch.equal(torch.get_rng_state(), state)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module) == attributes
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert model.lm_head.weight.grad.eq(1).all()
    assert ("ift" in str(model.forward.__class__)) == patched


def test_dropout_and_sampling_noise_do_not_matter():
    model = causal_lms.make("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    assert compare(model, causal_lms.batch(), ift=ift.IFTConfig()).verdict == "equal"


def test_a_loss_that_is_not_finite_is_undecided():
    model, batch = causal_lms.make("llama"), causal_lms.batch()
    with torch.no_grad():  # of a token that the trial at patch does not use
        model.model.embed_tokens.weight[batch["input_ids"].max()] = float("inf")
    assert compare(model, batch).verdict == "undecided"


def test_what_cannot_be_compared_is_refused_by_name():
    model, batch = causal_lms.make("llama"), causal_lms.batch()
    with pytest.raises(ValueError, match="batch: expected labels"):
        compare(model, {**batch, "labels": None})
    with pytest.raises(ValueError, match="rule: "):
        compare(model, batch, ift=ift.IFTConfig(rule="sample"))
    packed = {**batch, "position_ids": torch.arange(12).remainder(6).expand(3, -1)}
    with pytest.raises(ValueError, match="position_ids: "):
        compare(model, packed, ift=ift.IFTConfig())
