"""TRL's trainers on our log-probabilities, and `IFTSFTTrainer` on TRL's data."""

import copy
import functools

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer

import dense
from bench.peers.naive_ift import frozen_embedding, naive_ift_loss, refresh
from causal_lms import assert_close, batch, gradients, make
from ift.integrations import trl as integration
from ift.one_pass import target_logprobs
from ift.patching import head_options, patch, unpatch
from trainers import SGD
from trl_trainers import COMPLETIONS, TRAINERS, arguments, tiny_tokenizer, trained, trainer_of


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


# Of the optimizer step, not of the loss; and means over other tokens than TRL's, as documented.
UNLIKE = {"orpo": ("logits/",), "cpo": ("logits/",), "simpo": ("logits/",)}


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "rloo"])
def test_a_trainer_learns_the_same_on_our_kernels(name, tokenizer, tmp_path, monkeypatch):
    theirs, expected = trained(trainer_of(name, tokenizer, tmp_path))
    trainer = trainer_of(name, tokenizer, tmp_path)
    assert integration.use_ift_kernels(trainer, gradient="exact") is trainer
    calls = []
    original = trainer.model.lm_head.forward.__class__.__call__

    def counted(self, *args):
        out = original(self, *args)
        calls.append(out.shape[-1])
        return out

    monkeypatch.setattr(trainer.model.lm_head.forward.__class__, "__call__", counted)
    ours, got = trained(trainer)
    assert calls.count(0) >= 2, "no forward was ours"
    if name != "grpo":  # which generates with logits; else one measurement of each model
        assert set(calls) <= {0, len(tokenizer)} and calls.count(len(tokenizer)) <= 2
    skip = ("time", "runtime", "per_second", "total_flos", *UNLIKE.get(name, ()))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not any(part in key for part in skip):
                assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-5), key
    assert_close(got, expected, 2e-3)  # two steps of Adam: signs of tiny gradients


def first_losses(name, *given):
    """A trainer and its loss of the first batch: TRL's own, then on our kernels."""
    for ours in (False, True):
        trainer = trainer_of(name, *given)
        if ours:
            integration.use_ift_kernels(trainer, gradient="exact")
        batch = next(iter(trainer.get_train_dataloader()))
        yield trainer, trainer.compute_loss(trainer.model, batch)


def test_gradients_of_the_losses_are_the_same(tokenizer, tmp_path):
    for name in ("sft", "dpo", "kto", "orpo", "cpo"):
        grads = []
        for trainer, loss in first_losses(name, tokenizer, tmp_path):
            loss.backward()
            grads.append({n: p.grad for n, p in trainer.model.named_parameters()})
        assert_close(grads[1], grads[0], 2e-5)


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_lora_on_the_head(name, tokenizer, tmp_path):
    """The other trainers of TRL 1.16 refuse it when they are made."""
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    found = []
    for ours in (False, True):
        torch.manual_seed(5)
        trainer = trainer_of(name, tokenizer, tmp_path, peft_config=LoraConfig(**lora))
        if ours:
            integration.use_ift_kernels(trainer)
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model.eval(), batch)
        loss.backward()
        grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert any("lm_head" in n and g.any() for n, g in grads.items())
        found.append((loss.detach(), grads))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert_close(found[1][1], found[0][1], 2e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "mixtral", "cohere"])
def test_scales_caps_and_auxiliary_losses_are_those_of_the_model(architecture, tokenizer, tmp_path):
    theirs, ours = (
        loss.detach() for _, loss in first_losses("sft", tokenizer, tmp_path, architecture)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- float32 heads, and batches that do not matter -----------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "tied", "bf16"),
    [("llama", None, False), ("llama", True, True), ("gemma2", None, False), ("llama", None, True)],
)
def test_a_head_that_trl_casts_to_float32(architecture, tied, bf16, tokenizer, tmp_path):
    """Log-probabilities, loss and gradients are TRL's; logits are the model's.

    With large logits under autocast, too.
    """
    given = {"changes": {"cast_lm_head_to_fp32": True, "bf16": bf16}, "dtype": torch.bfloat16}
    given |= {"tied": tied, "spread": 0.3 if bf16 else 0.1}
    found, inputs = [], None
    for ours in (False, True):
        trainer = trainer_of("grpo", tokenizer, tmp_path, architecture, **given)
        trainer.current_gradient_accumulation_steps = 1
        model = trainer.model
        forward = model.lm_head.forward
        if inputs is None:
            inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            inputs["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.7])
        if ours:
            integration.use_ift_kernels(trainer, deterministic=True)
            assert head_options(model)[1:3] == (torch.float32, True)
        row = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        call = model, row, mask, inputs["completion_ids"].shape[1]
        with torch.no_grad():
            logits = model(input_ids=row, attention_mask=mask).logits
            old = trainer._get_per_token_logps_and_entropies(*call, compute_entropy=True)[:2]
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        found.append((logits, old, loss.detach(), gradients(model)))
        if ours:
            new = trainer._get_per_token_logps_and_entropies(*call, compute_entropy=True)[:2]
            assert all(map(torch.equal, new, old)) and new[0].requires_grad
            unpatch(model)
            assert model.lm_head.forward is forward
    (logits, *theirs, grads), (same, *mine, our_grads) = found
    assert logits.dtype == torch.float32 and torch.equal(logits, same)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert_close(our_grads, grads, 2**-6)  # of hidden, rounded at each layer
    table = "model.embed_tokens.weight" if "lm_head.weight" not in grads else "lm_head.weight"
    assert grads[table].dtype == our_grads[table].dtype == torch.float32
    if table == "lm_head.weight":
        assert_close({table: our_grads[table]}, {table: grads[table]}, 1e-5)


def test_float32_logits_under_autocast(tokenizer, tmp_path, monkeypatch):
    """As of TRL's head outside of it, of large logits, in the reference model, too."""
    outside = functools.partial(dpo_trainer.add_fused_lm_head, cast_lm_head_to_fp32=True)
    monkeypatch.setattr(dpo_trainer, "add_fused_lm_head", outside)
    losses = []
    for ours in (False, True):
        trainer = trainer_of("dpo", tokenizer, tmp_path, changes={"bf16": True}, spread=0.3)
        if ours:
            integration.use_ift_kernels(trainer, logits_dtype=torch.float32)
        with torch.no_grad():  # moves the policy away from its reference
            trainer.model.lm_head.weight.mul_(1.1)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        losses.append((loss.detach(), gradients(trainer.model)))
    (theirs, grads), (mine, our_grads) = losses
    assert abs(float(theirs) - 0.6931) > 1e-3
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert_close(our_grads, grads, 2**-6)


def test_a_head_that_trl_casts_after_the_patch(tokenizer, tmp_path):
    """Not patched since: noticed. Patched again, also in a copy: its own weights in float32."""
    model = patch(make("llama", vocab_size=len(tokenizer)).to(torch.bfloat16))
    given = {"dtype": torch.bfloat16, "changes": {"cast_lm_head_to_fp32": True}}
    cast = trainer_of("grpo", tokenizer, tmp_path, **given).model.lm_head.forward
    model.lm_head.float()
    model.lm_head.forward = cast
    inputs = batch(vocabulary=len(tokenizer))
    with pytest.raises(RuntimeError, match="output head was replaced after ift.patch"):
        model(**inputs)
    patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        for each in (model, other):
            logits = each(inputs["input_ids"], inputs["attention_mask"]).logits
            assert torch.equal(logits, hidden.float() @ each.lm_head.weight.T)
            logprob, mask = target_logprobs(each, **inputs)
            right = dense.oracle.statistics(logits[:, :-1], inputs["labels"][:, 1:])["logprob"]
            torch.testing.assert_close(logprob[:, :-1], right * mask[:, :-1], rtol=0, atol=1e-5)


def test_a_cast_of_all_copies_of_a_head_is_refused(tokenizer, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    given = {"changes": {"cast_lm_head_to_fp32": True}, "peft_config": lora}
    trainer = trainer_of("grpo", tokenizer, tmp_path, **given)
    with pytest.raises(TypeError, match="forward of the output head of Llama.* is already"):
        integration.use_ift_kernels(trainer)


def test_options_of_the_head_reach_every_model(tokenizer, tmp_path):
    options = {"logits_dtype": torch.float32, "deterministic": True}
    trainer = integration.use_ift_kernels(trainer_of("dpo", tokenizer, tmp_path), **options)
    for model in (trainer.model, trainer.ref_model):
        assert head_options(model) == ("exact", torch.float32, True, None)
    text = {"logits_dtype": "float32", "deterministic": True}  # as a file of arguments has it
    assert head_options(ift_trainer(tokenizer, tmp_path, **text).model)[1:3] == (
        torch.float32,
        True,
    )
    trainer = ift_trainer(tokenizer, tmp_path, ift={**text, "gamma": 0.5})
    assert trainer.ift_config.logits_dtype == "float32" and trainer.ift_config.deterministic
    assert head_options(trainer.model)[1:3] == (None, False)
    trainer.args.to_json_string()


# --- IFTSFTTrainer -------------------------------------------------------------------------------


def policy(tokenizer):
    return make("gpt2", vocab_size=len(tokenizer), pad_token_id=0)


def ift_trainer(tokenizer, directory, rows=COMPLETIONS, peft_config=None, ift=None, **changes):
    args = arguments(integration.IFTSFTConfig, directory, ift=ift, **changes)
    given = {"train_dataset": Dataset.from_list(rows), "peft_config": peft_config}
    given["processing_class"] = copy.deepcopy(tokenizer)
    return integration.IFTSFTTrainer(policy(tokenizer), args, **given)


def test_twenty_steps_are_those_of_the_released_algorithm(tokenizer, tmp_path):
    options = SGD | {"per_device_train_batch_size": 2, "max_steps": 20, "learning_rate": 0.05}
    trainer = ift_trainer(tokenizer, tmp_path, **options)
    reference = policy(tokenizer)
    batches = []
    step = trainer.training_step

    def keep(model, inputs, *rest):
        batches.append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return step(model, inputs, *rest)

    trainer.training_step = keep
    logs, got = trained(trainer)
    embedding = frozen_embedding(reference)
    losses = []
    optimizer = torch.optim.SGD(reference.parameters(), 0.05)
    for inputs in batches:
        loss = naive_ift_loss(
            reference, inputs["input_ids"], inputs["labels"], inputs["attention_mask"],
            embedding=embedding,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        refresh(embedding, reference)
        losses.append(float(loss))
    assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    assert_close(got, {n: p.detach() for n, p in reference.named_parameters()}, 1e-4)
    assert all({"entropy", "mean_token_accuracy", "num_tokens"} <= entry.keys() for entry in logs)
    assert [entry["loss_ift"] for entry in logs] == pytest.approx(losses, rel=1e-4)
    assert all(entry["loss_sft"] > 0 and entry["lam"] == 0.2 for entry in logs)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "max_length": 32},
        {"padding_free": True, "max_length": None},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 4, "average_tokens_across_devices": False},
    ],
    ids=str,
)
def test_packed_and_accumulated_rows_are_rows(changes, tokenizer, tmp_path):
    """The first step's loss and gradient are those of one padded batch of all rows."""
    options = SGD | {"learning_rate": 1.0}
    plain = ift_trainer(tokenizer, tmp_path, per_device_train_batch_size=8, **options)
    start = {n: p.detach().clone() for n, p in plain.model.named_parameters()}
    _, expected = trained(plain)
    size = 8 // changes.get("gradient_accumulation_steps", 1)
    other = ift_trainer(tokenizer, tmp_path, per_device_train_batch_size=size, **options, **changes)
    _, got = trained(other)
    moved = [{n: p[n] - start[n] for n in start} for p in (got, expected)]
    assert_close(*moved, 1e-3)


def test_chat_rows_with_lora(tokenizer, tmp_path):
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in COMPLETIONS
    ]
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    trainer = ift_trainer(tokenizer, tmp_path, chat, peft_config=lora)
    head = trainer.model.get_base_model().lm_head.weight.detach().clone()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    logs, after = trained(trainer)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved and all("lora" in n for n in moved)
    assert torch.equal(head, trainer.model.get_base_model().lm_head.weight)
    assert all(entry["loss"] > 0 for entry in logs)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_evaluation_is_cross_entropy_per_target(size, tokenizer, tmp_path):
    rows = Dataset.from_list(COMPLETIONS)
    given = {"train_dataset": rows, "eval_dataset": rows}
    given["processing_class"] = copy.deepcopy(tokenizer)
    plain = SFTTrainer(policy(tokenizer), arguments(SFTConfig, tmp_path), **given)
    theirs = plain.evaluate()  # of one batch, which is the whole set
    trainer = ift_trainer(tokenizer, tmp_path, per_device_eval_batch_size=size)
    for named in ({}, {"metric_key_prefix": "other"}):
        ours = trainer.evaluate(rows, **named)
        prefix = named.get("metric_key_prefix", "eval")
        for key in ("loss", "entropy", "mean_token_accuracy"):
            assert ours[f"{prefix}_{key}"] == pytest.approx(theirs[f"eval_{key}"], rel=1e-4)
        assert {f"{prefix}_{key}" for key in ("num_tokens", "loss_sft", "loss_ift")} <= set(ours)


def test_evaluation_with_logits_is_the_same(tokenizer, tmp_path):
    trainer = ift_trainer(tokenizer, tmp_path, per_device_eval_batch_size=3)
    rows = Dataset.from_list(COMPLETIONS)
    loss = trainer.evaluate(rows)["eval_loss"]
    trainer.compute_metrics = lambda p: {"width": p.predictions.shape[-1]}
    metrics = trainer.evaluate(rows)
    assert metrics["eval_loss"] == loss and metrics["eval_width"] == len(tokenizer)


def test_what_cannot_serve_is_refused(tokenizer, tmp_path):
    class Other:
        args = None

    with pytest.raises(TypeError, match="trainer: expected one of TRL's"):
        integration.use_ift_kernels(Other())
    with pytest.raises(TypeError, match="args: expected an IFTSFTConfig"):
        integration.IFTSFTTrainer(make("llama"), arguments(SFTConfig, tmp_path))
    several = arguments(integration.IFTSFTConfig, tmp_path)
    several._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel"):
        integration.IFTSFTTrainer(
            policy(tokenizer), several, train_dataset=Dataset.from_list(COMPLETIONS),
            processing_class=copy.deepcopy(tokenizer),
        )  # fmt: skip
    with pytest.raises(ValueError, match="loss_type"):
        ift_trainer(tokenizer, tmp_path, loss_type="dft")
    with pytest.raises(ValueError, match="lam: expected"):
        ift_trainer(tokenizer, tmp_path, ift={"lam": 2})
