"""The code of docs/integrations, executed as it is written, against each library's calls."""

import copy
import sys

import pytest
import recipes
import torch
from recipes import install, recipe, run
from torch.distributed.fsdp import fully_shard
from transformers import Seq2SeqTrainingArguments, TrainingArguments

import ift
from bench.peers.naive_ift import naive_ift_loss
from causal_lms import assert_close, batch, gradients, make
from ift_kernels import linear_logprobs
from trainers import SGD, training_arguments


def padded():
    """Rows with padding in front, behind and on neither side."""
    inputs = batch(rows=3, length=11)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    mask[1] = mask[1].roll(mask.shape[1] - int(mask[1].sum()))
    ids[1] = ids[1].roll(ids.shape[1] - int(mask[1].sum()))
    return ids, mask


# --- OpenRLHF ------------------------------------------------------------------------------------

CALLS = {  # as in ppo_actor.py, experience making, sft_trainer.py, dpo_trainer.py
    "policy": {"action": True, "return_output": True, "return_entropy": True},
    "old policy": {"action": True},
    "sft": {"return_output": True, "return_logprobs": True},
    "evaluation": {"return_logprobs": True},
}


@pytest.fixture
def kernel_actor(monkeypatch):
    members = {n: getattr(recipes, n) for n in ("unpad_and_slice_tensor", "gather_and_pad_tensor")}
    install(monkeypatch, openrlhf__models__ring_attn_utils=members)
    package = install(monkeypatch, openrlhf__models={"Actor": recipes.Actor})
    names = run(recipe("openrlhf"))
    assert package.Actor is names["KernelActor"]
    return names["KernelActor"]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_openrlhf_actor(kernel_actor, call, packing):
    ids, mask = padded()
    options = {"attention_mask": mask, **CALLS[call]}
    if options.pop("action", False):
        options["action_mask"] = mask[:, -7:].bool()
    seen = []
    for kind in (recipes.Actor, kernel_actor):
        actor = kind(make("llama"), packing_samples=packing, temperature=0.7)
        result = actor(ids, **options)
        log_probs, output = result if options.get("return_output") else (result, None)
        loss = (log_probs * torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)).sum()
        values = [log_probs.detach()]
        if options.get("return_entropy"):
            loss = loss + 0.3 * (output.entropy * mask[:, 1:]).square().sum()
            values.append(output.entropy.detach())
        loss.backward()
        seen.append((values, gradients(actor.model)))
    (expected, grads), (values, ours) = seen
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert_close(ours, grads)


def test_openrlhf_actor_gives_logits_where_they_are_wanted(kernel_actor):
    ids, mask = padded()
    actors = [k(make("gpt2"), temperature=2.0) for k in (recipes.Actor, kernel_actor)]
    theirs, ours = (actor(ids, attention_mask=mask, return_output=True) for actor in actors)
    torch.testing.assert_close(ours.logits, theirs.logits)


# --- verl ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("packed", [True, False])
def test_verl_engine(monkeypatch, temperature, packed):
    class Engine(recipes.FSDPEngineWithLMHead):
        pass

    members = {"FSDPEngineWithLMHead": Engine}
    install(monkeypatch, verl__workers__engine__fsdp__transformer_impl=members)
    run(recipe("verl"))
    rows = [torch.randint(3, 131, (n,)) for n in (7, 4, 9)]
    last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    keep = torch.ones(20, dtype=torch.bool).index_fill(0, last, False)  # verl drops the last
    positions = [torch.arange(len(row)) for row in rows]
    seen = []
    for fused in (False, True):
        model = make("qwen3")
        micro_batch = {
            "input_ids": torch.nested.nested_tensor(rows, layout=torch.jagged),
            "position_ids": torch.nested.nested_tensor(positions, layout=torch.jagged),
            "temperature": temperature,
            "use_remove_padding": packed,
            "use_fused_kernels": fused,
        }
        output = Engine(model, fused).forward_step(micro_batch, None, False)
        log_probs, entropy = (output[n][keep] for n in ("log_probs", "entropy"))
        loss = (log_probs * torch.linspace(-1, 1, len(log_probs))).sum() + 0.1 * entropy.sum()
        loss.backward()
        seen.append((log_probs.detach(), entropy.detach(), gradients(model)))
    torch.testing.assert_close(seen[1][:2], seen[0][:2], rtol=1e-5, atol=1e-5)
    assert_close(seen[1][2], seen[0][2])


# --- axolotl, LLaMA-Factory ----------------------------------------------------------------------


def arguments(directory, kind=TrainingArguments):
    return training_arguments(
        directory, kind, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1.0, do_train=True, **SGD,
    )  # fmt: skip


def dataset():
    inputs = batch(rows=4, length=10)
    inputs["labels"][2, :8] = -100  # rows and batches of unequal counts
    return inputs, [{key: value[row] for key, value in inputs.items()} for row in range(4)]


def one_step(model, inputs, ift_loss):
    """Parameters after the SGD step that the trainer should take, in plain torch."""
    parameters = list(model.parameters())
    if ift_loss:
        names = ("input_ids", "labels", "attention_mask")
        loss = naive_ift_loss(model, *(inputs[n] for n in names), lam=0.2, gamma=0.95)
    else:  # a mean over the tokens of the step
        loss = model(**inputs, num_items_in_batch=(inputs["labels"][:, 1:] != -100).sum()).loss
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), [
        p - (0 if g is None else g) for p, g in zip(parameters, grads, strict=True)
    ]


def assert_stepped(trainer, expected, start):
    """The same step, seen in the parameters' change."""
    for new, right, old in zip(trainer.model.parameters(), expected, start, strict=True):
        right, new = (right - old).detach(), (new - old).detach()
        assert (new - right).abs().max() <= 2e-4 * right.abs().max().clamp(min=1e-3)


@pytest.fixture
def plugin(monkeypatch):
    """The class of the page's plugin."""
    members = {"AxolotlTrainer": recipes.AxolotlTrainer}
    install(monkeypatch, axolotl__core__trainers__base=members)
    install(monkeypatch, axolotl__integrations__base={"BasePlugin": recipes.BasePlugin})
    return run(recipe("axolotl"))["IFTPlugin"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_axolotl_ift(plugin, tmp_path, architecture):
    (inputs, rows), model = dataset(), make(architecture)
    start = [p.detach().clone() for p in model.parameters()]
    loss, expected = one_step(copy.deepcopy(model), inputs, True)
    trainer = recipes.build(plugin(), {}, model, rows, arguments(tmp_path))
    trainer.train()
    assert_stepped(trainer, expected, start)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-3)


def test_axolotl_sft_is_ours(plugin, monkeypatch, tmp_path):
    monkeypatch.delattr(plugin, "get_trainer_cls")  # as the page says
    _, rows = dataset()
    trainer = recipes.build(plugin(), {}, make("llama"), rows, arguments(tmp_path))
    trainer.train()
    assert type(trainer) is recipes.AxolotlTrainer
    assert trainer.model.ift_metrics["tokens"] > 0


@pytest.mark.parametrize("number", [0, 1], ids=["sft", "ift"])
@pytest.mark.parametrize("architecture", ["llama", "phi", "granite"])
def test_llama_factory(monkeypatch, tmp_path, number, architecture):
    (inputs, rows), model, trained = dataset(), make(architecture), []
    start = [p.detach().clone() for p in model.parameters()]
    loss, expected = one_step(copy.deepcopy(model), inputs, number == 1)
    args = arguments(tmp_path, Seq2SeqTrainingArguments)
    recipes.llama_factory(monkeypatch, model, rows, args, trained)
    run(recipe("llama_factory", number))
    (trainer,) = trained
    assert trainer.model.ift_metrics["tokens"] > 0  # the patched forward ran
    assert_stepped(trainer, expected, start)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-3)


# --- torchtitan ----------------------------------------------------------------------------------


@pytest.fixture
def kernel_loss(monkeypatch):
    members = {"ChunkedLossWrapper": recipes.ChunkedLossWrapper}
    install(monkeypatch, torchtitan__components__loss=members)
    # The class's dataclass looks itself up in the module that it says it is of.
    return run(recipe("torchtitan"), __name__="torchtitan.components.loss")["KernelLoss"]


@pytest.mark.parametrize("ignored", [0, 5, 24])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "FSDP"])
def test_torchtitan_loss(kernel_loss, one_process, ignored, sharded):
    tokens = torch.randint(61, (3, 8))
    labels = tokens.roll(-1, 1).flatten().index_fill(0, torch.arange(ignored), -100).view(3, 8)
    seen = []
    for kind in (recipes.ChunkedLossWrapper, kernel_loss):
        torch.manual_seed(0)
        model = recipes.Decoder()
        if sharded:
            fully_shard(model.lm_head)
            fully_shard(model)
        loss = recipes.torchtitan_step(model, kind(kind.Config()), tokens, labels)
        if ignored < 24:  # 0 tokens: theirs is NaN
            loss.backward()
        grads = {n: g if g is None else getattr(g, "full_tensor", lambda g=g: g)()
                 for n, g in gradients(model).items()}  # fmt: skip
        seen.append((loss.detach(), grads))
    if ignored < 24:
        torch.testing.assert_close(seen[1][0], seen[0][0])
        assert_close(seen[1][1], seen[0][1])


def test_torchtitan_refuses_a_sharded_head(kernel_loss):
    model = recipes.Decoder()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:31].detach())
    tokens = torch.randint(61, (3, 8))
    with pytest.raises(ValueError, match="lm_head: expected its whole weight"):
        recipes.torchtitan_step(model, kernel_loss(kernel_loss.Config()), tokens, tokens)


# --- Several processes, Lightning, TRL -----------------------------------------------------------


def test_distributed(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    inputs, plain = batch(), make("llama")
    right = plain(**inputs).loss
    right.backward()
    model = run(recipe("distributed"), ift=ift, fully_shard=fully_shard, model=make("llama"))
    loss = model["model"](**inputs).loss
    torch.testing.assert_close(loss, right)
    hidden, weight = torch.randn(5, 8), torch.randn(20, 8)
    names = {
        "ColwiseParallel": ColwiseParallel, "Replicate": Replicate, "ift": ift,
        "parallelize_module": parallelize_module, "mesh": init_device_mesh("cpu", (1,)),
        "model": make("llama"), "ids": inputs["input_ids"], "labels": inputs["labels"],
        "hidden": hidden, "weight": weight, "target": torch.arange(5),
        "group": torch.distributed.group.WORLD, "ift_kernels": sys.modules["ift_kernels"],
    }  # fmt: skip
    done = run(recipe("distributed", 1), **names)
    plain = make("llama")
    plain(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss.backward()
    torch.testing.assert_close(
        done["model"].lm_head.weight.grad.full_tensor(), plain.lm_head.weight.grad,
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    expected = linear_logprobs(hidden, weight, torch.arange(5)).logprob
    torch.testing.assert_close(done["stats"].logprob, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(tmp_path, accumulate):
    lightning = pytest.importorskip("lightning")
    make("gpt2").save_pretrained(tmp_path / "model")
    recipes_module = run(recipe("lightning"), __name__="recipe")["Module"]

    class Module(recipes_module):
        def configure_optimizers(self):  # Adam would amplify rounding where a gradient is 0
            super().configure_optimizers()
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module(tmp_path / "model")
    inputs = batch(rows=4)
    rows = [{key: value[n : n + 2] for key, value in inputs.items()} for n in (0, 2)]
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
    assert trainer.global_step == 2 // accumulate and module.model.training
    reference = ift.patch(make("gpt2"))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for number, row in enumerate(rows):
        (reference(**row, ift=ift.IFTConfig()).loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    found = [list(m.parameters()) for m in (module.model, reference)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_trl(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from ift.tiny import train_tokenizer

    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["a small text of a few words"] * 3, 300)
    tiny = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    make("llama", **tiny).save_pretrained("model")
    tokenizer.save_pretrained("model")
    pairs = [{"prompt": "a small", "chosen": " text", "rejected": " few"}] * 2
    rows = Dataset.from_list([{"prompt": "a small", "completion": " text of words"}] * 4)
    options = 'output_dir="out", use_cpu=True, bf16=False, report_to=[], max_steps=1'
    source = recipe("trl").replace("path/to/model", "model")
    source = source.replace('output_dir="out"', options)
    model = make("llama", **tiny)
    model.name_or_path = model.config._name_or_path = "model"
    names = {
        "DPOTrainer": trl.DPOTrainer, "DPOConfig": trl.DPOConfig, "dataset": rows,
        "pairs": Dataset.from_list(pairs), "model": model,
    }  # fmt: skip
    trained = []
    before, after = source.split("# TRL's own loss")
    for part in (before, f"{recipe('trl').splitlines()[0]}\n#{after}"):
        names |= run(part, **names)
        trained.append(names["trainer"])
        names["trainer"].train()
    assert [type(each).__name__ for each in trained] == ["IFTSFTTrainer", "DPOTrainer"]
    assert all(each.state.log_history for each in trained)
