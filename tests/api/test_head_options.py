"""`logits_dtype` and `deterministic` of a model's head, wherever its statistics are computed."""

import copy
import dataclasses
import functools
import io
import itertools
import json

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from causal_lms import assert_close, batch, lora, make, step
from ift import losses
from ift.config import IFTConfig
from ift.head_pass import HeadForward
from ift.integrations.transformers import IFTTrainer
from ift.losses import Head, from_hidden
from ift.measure import measure
from ift.one_pass import target_logprobs
from ift.patching import head_options, patch, unpatch
from ift_kernels import linear_logprobs
from refusals import assert_refused
from trainers import training_arguments

FLOAT32 = {"logits_dtype": torch.float32}


def bf16(name, **options):
    return make(name, **options).to(torch.bfloat16).eval()


def float32_head(model):
    """The model with a head of its own in float32, on hidden states as they are."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().float())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach().float())
    head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    return model


def dense_logprobs(model, inputs):
    """Of the model's own logits, (B, T), 0 at the last position and where there is no target."""
    labels = inputs["labels"][:, 1:]
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]
    logprob = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return nn.functional.pad(logprob * (labels != -100), (0, 1))


# --- logits_dtype ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "phi"])
def test_log_probabilities_are_those_of_a_head_in_float32(name):
    """Untied, tied, softcap, scale, bias."""
    model, inputs = bf16(name), batch()
    rounded = dense_logprobs(model, inputs)
    expected = dense_logprobs(float32_head(copy.deepcopy(model)), inputs)
    before, _ = target_logprobs(patch(copy.deepcopy(model)), **inputs)
    got, _ = target_logprobs(patch(model, **FLOAT32), **inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (rounded - expected).abs().max() > 1e-4  # or this would show nothing
    assert torch.equal(target_logprobs(patch(unpatch(model)), **inputs)[0], before)


def test_gradients_are_those_of_a_head_in_float32():
    ours = step(patch(bf16("llama"), **FLOAT32), **batch())
    theirs = step(float32_head(bf16("llama")), **batch())
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    head = {"lm_head.weight": ours[1].pop("lm_head.weight")}
    assert head["lm_head.weight"].dtype == torch.bfloat16  # rounded once
    assert_close(head, {n: theirs[1].pop(n) for n in head}, 2**-8)
    assert_close(ours[1], theirs[1], 2**-5)  # of hidden, rounded at each layer


def test_logits_and_generation_are_those_of_the_model():
    model, inputs = bf16("llama"), batch()
    ids = {"input_ids": inputs["input_ids"][:1]}

    def outputs():
        options = {"max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
        made = model.generate(**ids, do_sample=False, **options)
        return [model(**ids).logits, made.sequences, *made.scores]

    before = outputs()
    patch(model, **FLOAT32, deterministic=True)
    assert all(map(torch.equal, before, outputs()))


def test_adapters():
    for options in ({}, {"modules_to_save": ["lm_head"]}):
        torch.manual_seed(0)
        model, inputs = lora(bf16("llama"), **options).to(torch.bfloat16).eval(), batch()
        head = model.get_base_model().get_output_embeddings()
        saved = getattr(head, "modules_to_save", {"default": head})["default"]
        with torch.no_grad():
            saved.weight.add_(0.1)  # a trained copy
        hidden = []
        hook = saved.register_forward_pre_hook(lambda _, args, to=hidden: to.append(args[0]))
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        hook.remove()
        logits = hidden[0].float() @ saved.weight.float().T
        target = inputs["labels"][:, 1:]
        logprob = logits.log_softmax(-1)[:, :-1].gather(-1, target.clamp(min=0)[..., None])[..., 0]
        got, _ = target_logprobs(patch(model, **FLOAT32), **inputs)
        expected = logprob * (target != -100)
        torch.testing.assert_close(got[:, :-1], expected, rtol=0, atol=1e-5)


def test_autocast_rounds_the_body_alone():
    model, inputs = make("llama").eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        rounded, _ = target_logprobs(patch(model), **inputs)
        got, _ = target_logprobs(patch(model, **FLOAT32), **inputs)
    target = inputs["labels"][:, 1:]
    logprob = (hidden.float() @ model.lm_head.weight.T).log_softmax(-1)[:, :-1]
    expected = logprob.gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target != -100)
    torch.testing.assert_close(got[:, :-1], expected, rtol=0, atol=1e-5)
    assert (rounded[:, :-1] - expected).abs().max() > 1e-3


def test_sharded_heads(one_process):
    expected, _ = target_logprobs(patch(bf16("llama"), **FLOAT32, deterministic=True), **batch())
    mesh = init_device_mesh("cpu", (1,))
    plan = ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    vocabulary = patch(bf16("llama"), **FLOAT32, deterministic=True)
    vocabulary.lm_head = parallelize_module(vocabulary.lm_head, mesh, plan)
    sharded = patch(bf16("llama"), **FLOAT32)
    for part in (sharded.lm_head, sharded):
        fully_shard(part, mesh=mesh)
    for model in (vocabulary, sharded):
        got, _ = target_logprobs(model, **batch())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert got.requires_grad


def test_both_passes_of_ift():
    """The options of a call are those of the patch; None leaves those."""
    inputs, results = batch(), []
    for patched, given in (
        (FLOAT32, {}),
        ({}, {"logits_dtype": torch.float32}),
        ({}, {"logits_dtype": "float32"}),
        ({}, {}),
    ):
        model = patch(bf16("llama"), **patched)
        config = IFTConfig(share_prompt=False, **given)
        assert config.logits_dtype == ("float32" if given else None)
        assert IFTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
        assert config == config.replace(step=0)
        model(**inputs, ift=config)
        results.append([float(model.ift_metrics[name]) for name in ("loss_sft", "loss_ift")])
    assert results[0] == results[1] == results[2]
    assert all(a != b for a, b in zip(results[0], results[3], strict=True))
    # The first pass of a rule that is no argmax; its statistics are those of float32 logits, too.
    model = patch(bf16("llama"))
    for rule in ("kth", "sample", "soft"):
        model(**inputs, ift=IFTConfig(rule=rule, share_prompt=False, **FLOAT32))
        assert float(model.ift_metrics["loss_sft"]) == results[0][0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_patch_compares_like_with_like(name, autocast, monkeypatch):
    """Large logits that the model rounds; a transform that is not the model's is seen all the same.

    Also in an autocast that is around the model's forward, as accelerate puts it.
    """

    def made():
        model = make(name, initializer_range=0.5).eval()
        model = model if autocast else model.to(torch.bfloat16)
        if name == "phi":
            nn.init.normal_(model.lm_head.bias)
        forward = model.forward

        @functools.wraps(forward)
        def wrapped(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return forward(*args, **kwargs)

        model.forward = wrapped
        return model

    for options in ({}, FLOAT32, FLOAT32 | {"deterministic": True}):
        model = patch(made(), **options)
        assert isinstance(model.lm_head.forward, HeadForward)

    def wrong(*args):
        measured = measure(*args)
        scale = measured.transform.scale * (1 + 2**-8)
        return measured._replace(transform=dataclasses.replace(measured.transform, scale=scale))

    monkeypatch.setattr("ift.measure.measure", wrong)
    with pytest.raises(RuntimeError, match="loss of four tokens is .* cannot be patched"):
        patch(made(), **FLOAT32)


# --- both -----------------------------------------------------------------------------------------


def test_options_stay_until_unpatch(tmp_path):
    model = patch(make("llama"), deterministic=True)
    patch(model)
    assert head_options(model) == ("exact", None, True, None)
    patch(model, **FLOAT32)
    other = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for one in (other, torch.load(buffer, weights_only=False)):
        assert head_options(one) == ("exact", torch.float32, True, None)
    patch(model, deterministic=False)
    assert head_options(model) == ("exact", torch.float32, False, None)
    assert head_options(other).deterministic
    assert head_options(patch(unpatch(model))) == ("exact", None, False, None)
    IFTTrainer(model, training_arguments(tmp_path), **FLOAT32, deterministic=True)
    assert head_options(model) == ("exact", torch.float32, True, None)


def test_what_excludes_each_other_is_refused_at_patch(tmp_path):
    active = "expected 'exact' with deterministic=True"
    both = {"gradient": "active", "deterministic": True}
    model = make("llama")
    assert_refused(patch, both, ValueError, active, model=model)
    assert "_ift_patch" not in model.__dict__
    for first, second in itertools.permutations(both.items()):
        model = patch(make("llama"), **dict([first]))
        before = head_options(model)
        with pytest.raises(ValueError, match=f"^gradient: {active}"):
            patch(model, **dict([second]))
        assert head_options(model) == before
    args = training_arguments(tmp_path)
    with pytest.raises(ValueError, match=f"^gradient: {active}"):
        IFTTrainer(make("llama"), args, **both)
    double = make("llama").double()
    assert_refused(patch, FLOAT32, ValueError, "expected None for float64 inputs", model=double)
    for value in (torch.bfloat16, "bfloat16", torch.float64, 32):
        given = {"logits_dtype": value}
        for call in (IFTConfig, lambda **more: patch(make("llama"), **more)):
            assert_refused(call, given, ValueError, "expected None or torch.float32")
    hidden, weight, target = torch.ones(2, 4), torch.ones(5, 4), torch.tensor([1, 2])
    text = {"logits_dtype": "float32"}  # of files of options: not of operations
    said = "expected None or torch.float32, a torch dtype, got 'float32'"
    for call in (linear_logprobs, functools.partial(from_hidden, losses.sft_loss)):
        refused = functools.partial(call, hidden, weight, target)
        assert_refused(refused, text, ValueError, said)
    for value in (1, "yes"):
        for call in (IFTConfig, lambda **more: patch(make("llama"), **more)):
            assert_refused(call, {"deterministic": value}, TypeError, "expected True or False")
    soft = "expected one that picks a token with deterministic=True"
    assert_refused(IFTConfig, {"rule": "soft"}, ValueError, soft, deterministic=True)
    model = patch(make("llama"), deterministic=True)
    with pytest.raises(ValueError, match=f"^rule: {soft}"):
        model(**batch(), ift=IFTConfig(rule="soft"))
    model(**batch(), ift=IFTConfig(rule="soft", deterministic=False))  # of this call alone
    model = patch(make("llama"), gradient="active")
    with pytest.raises(ValueError, match=f"^gradient: {active}"):
        model(**batch(), ift=IFTConfig(deterministic=True))


# --- deterministic --------------------------------------------------------------------------------

HIDDEN = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
]


def token_losses(logprob, mask, *, metrics=None):
    return -logprob


@pytest.mark.parametrize(("dtype", "logits_dtype"), HIDDEN, ids=str)
def test_a_row_is_the_same_in_any_batch(dtype, logits_dtype):
    """Alone, padded on either side, packed, in another order, with gradient: bit for bit."""
    lengths, width = [37, 5, 64, 1, 20], 96
    weight = torch.randn(515, 48).to(dtype).requires_grad_()
    rows = [torch.randn(n, 48).to(dtype) for n in lengths]
    targets = [torch.randint(515, (n,)) for n in lengths]
    options = {"logits_dtype": logits_dtype, "deterministic": True}

    def scored(hidden, target, **more):
        return from_hidden(token_losses, hidden, weight, target, **options, **more).detach()

    def padded(left, order):
        out = []
        for i in order:
            pad = (width - lengths[i], 0) if left else (0, width - lengths[i])
            hidden = nn.functional.pad(rows[i], (0, 0, *pad), value=0.5)
            out.append((hidden, nn.functional.pad(targets[i], pad, value=-100)))
        return (torch.stack(part) for part in zip(*out, strict=True))

    with torch.no_grad():
        alone = [scored(*row) for row in zip(rows, targets, strict=True)]
        for left in (False, True):
            got = scored(*padded(left, range(5)))
            for i, n in enumerate(lengths):
                assert torch.equal(got[i, -n:] if left else got[i, :n], alone[i])
        packed = torch.cat(rows), torch.cat(targets)
        assert torch.equal(scored(*packed), torch.cat(alone))
        for workspace in (1 << 20, 3 << 20):
            assert torch.equal(scored(*packed, workspace=workspace), torch.cat(alone))
    order = [3, 1, 4, 0, 2]
    hidden, target = padded(False, order)
    with_gradient = scored(hidden.requires_grad_(), target)
    for row, i in enumerate(order):
        assert torch.equal(with_gradient[row, : lengths[i]], alone[i])


@pytest.mark.parametrize(("dtype", "logits_dtype"), HIDDEN, ids=str)
def test_the_same_model_as_reference_is_no_other(dtype, logits_dtype):
    weight = torch.randn(300, 32).to(dtype)
    hidden, target = torch.randn(6, 40, 32).to(dtype), torch.randint(300, (6, 40))
    target[:, :7] = -100
    metrics = {}
    loss = from_hidden(
        losses.dpo_loss, hidden.clone().requires_grad_(), weight.clone().requires_grad_(), target,
        reference=Head(hidden, weight), metrics=metrics, logits_dtype=logits_dtype,
        deterministic=True,
    )  # fmt: skip
    assert float(metrics["reward_margin"]) == 0.0
    assert float(loss.detach()) == float(-nn.functional.logsigmoid(torch.zeros(())))


def single_targets(inputs):
    """The same rows with one target at a time, in the first of them."""
    for position in range(5, 12):
        labels = torch.full_like(inputs["labels"], -100)
        labels[0, position] = inputs["labels"][0, position]
        yield position - 1, {**inputs, "labels": labels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_pass_is_its_training_pass(dtype):
    """Of a patched model on the same batch: without gradient or with one, whatever is scored."""
    for name in ("phi", "gemma2"):
        model = patch(make(name).to(dtype).eval(), deterministic=True)
        with torch.no_grad():
            before, _ = target_logprobs(model, **batch())
        after, _ = target_logprobs(model, **batch())
        assert after.requires_grad and torch.equal(before, after)
        for position, inputs in single_targets(batch()):
            alone, _ = target_logprobs(model, **inputs)
            assert torch.equal(alone[0, position], before[0, position])


def test_both_passes_of_ift_give_the_same_bits():
    """Next to nothing is mixed, so that both have the same hidden states."""
    every, _ = target_logprobs(patch(make("phi").eval(), deterministic=True), **batch())
    model = patch(make("phi").eval())
    config = IFTConfig(lam=1e-30, gamma=0.0, share_prompt=False, deterministic=True)
    for position, inputs in single_targets(batch()):
        model(**inputs, ift=config)
        for name in ("loss_sft", "loss_ift"):
            assert torch.equal(model.ift_metrics[name], -every[0, position].detach())


def test_losses_from_hidden_states_of_other_dtypes():
    """A frozen model in bf16 beside a policy in float32, and the reverse."""
    hidden, weight, target = torch.randn(4, 6, 16), torch.randn(100, 16), torch.randint(100, (4, 6))
    wide = hidden + 0.1, weight + 0.05
    rounded = [x.to(torch.bfloat16) for x in wide]
    exact = [x.float() for x in rounded]
    for policy, frozen, same in (((hidden, weight), rounded, exact), (rounded, wide, wide)):
        right = [x.float() for x in policy]
        got = losses.distillation_loss(*policy, target, Head(*frozen), **FLOAT32)
        expected = losses.distillation_loss(*right, target, Head(*same))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        loss = losses.DPOLoss(beta=0.3)
        got = loss.from_hidden(*policy, target, reference=Head(*frozen), **FLOAT32)
        expected = loss.from_hidden(*right, target, reference=Head(*same))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="deterministic: expected False with distillation_loss"):
        losses.distillation_loss(*policy, target, Head(*frozen), deterministic=True)
