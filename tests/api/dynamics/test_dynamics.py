"""Probe sets, their measurement against plain full logits, the callback, monitor and guard."""

import copy
import functools
import json

import pytest
import torch
import transformers as hf

import causal_lms
import dense
import ift
from command_line import untimed
from ift import tiny
from ift.data import encode
from ift.data_rows import DataError
from ift.dynamics import (
    Probe,
    ProbeCallback,
    ProbeEvaluator,
    SqueezeMonitor,
    ValleyGuard,
    build_probe_set,
    read_probes,
    sampler,
    write_probes,
)
from ift.dynamics.callback import read_records
from ift.dynamics.responses import as_row
from ift.losses import dpo_loss
from trainers import training_arguments

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star"]


def rows(count=12):
    return [
        {
            "prompt": f"Tell me of the {WORDS[i % 12]} {WORDS[(i * 5 + 1) % 12]}:",
            "chosen": " " + " ".join(WORDS[(i + 5 * j) % 12] for j in range(1, 4 + i % 4)),
            "rejected": " " + " ".join(WORDS[(i + 7 * j) % 12] for j in range(1, 3 + i % 5)),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer([" ".join(row.values()) for row in rows()], 300)


STATISTICS = ("logprob", "argmax", "argmax_logprob", "entropy", "sum_sq")


def plain(model, tokenizer, probes):
    """Every statistic from full logits, one response at a time; only the tokenisation is ours."""
    model.eval()
    found = {}
    for i, probe in enumerate(probes):
        for name, text in probe.responses.items():
            (e,) = encode([as_row("x", probe.prompt, text)], tokenizer, 512).examples
            ids, labels = (torch.tensor(e[k]).long() for k in ("input_ids", "labels"))
            with torch.no_grad():
                z = model(input_ids=ids[None]).logits[0, :-1].double()
            kept = labels[1:] != -100
            z, y = z[kept], labels[1:][kept]
            p, stats = z.softmax(-1), dense.oracle.statistics(z, y)
            found[i, name] = {
                "ids": y,
                "off_argmax": 1 - p.amax(1),
                "energy": 1 - p.gather(1, y[:, None])[:, 0],
                "a_norm": torch.stack([(torch.eye(len(q)) - q).norm() for q in p]),
                "distance": (p - torch.nn.functional.one_hot(y, p.shape[1])).norm(dim=1),
                **{name: stats[name] for name in STATISTICS},
            }
    return found


def check(model, tokenizer, probes, shared=True, **options):
    wanted = plain(model, tokenizer, probes)
    model.train()
    evaluator = ProbeEvaluator(probes, tokenizer, **options)
    state = torch.get_rng_state()
    found = evaluator(model)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert evaluator.shares_prompts is shared
    assert [(m.probe, m.type) for m in found] == list(wanted)
    for one in found:
        for name, value in wanted[one.probe, one.type].items():
            got = getattr(one, name)
            if value.dtype == torch.int64:
                assert torch.equal(got, value), name
            else:
                if name == "distance":  # near one-hot its root magnifies the rounding of Σp²
                    torch.testing.assert_close(got.double() ** 2, value**2, rtol=0, atol=1e-6)
                    got, value = got[value > 0.1], value[value > 0.1]
                torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)
    return evaluator


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "cohere", "phi", "mixtral"])
def test_numbers_equal_full_logits(name, attention, tokenizer):
    model = causal_lms.make(name, vocab_size=len(tokenizer), attn_implementation=attention)
    probes = build_probe_set(rows(), size=5, test=rows(3))
    assert set(probes[0].responses) >= {"chosen", "rejected", "other_train", "unrelated"}
    before = dict(model.__dict__), dict(model.get_output_embeddings().__dict__)
    check(model, tokenizer, probes, tokens_per_forward=150)
    assert (dict(model.__dict__), dict(model.get_output_embeddings().__dict__)) == before


def test_logit_softcap_patched_and_messages(tokenizer):
    model = ift.patch(causal_lms.make("gemma2", vocab_size=len(tokenizer), sliding_window=400))
    prompt = [{"role": "user", "content": "red cat?"}]
    probes = [
        Probe(prompt, {"chosen": "blue dog", "other_train": "moon"}),
        Probe("sun", {"x": "a"}),
    ]
    check(model, tokenizer, probes)


# A model with its own idea of masks must not pass unnoticed.
def test_a_model_is_measured_as_it_is_trained(tokenizer):
    """With the float32 logits of its patch; the options of a patch go with it."""
    probes = build_probe_set(rows(4), size=2, tokenizer=tokenizer)
    evaluator = ProbeEvaluator(probes, tokenizer)
    model = tiny.tiny_llama(tokenizer, max_length=96, seed=0).to(torch.bfloat16)
    rounded = evaluator(model)
    got = evaluator(ift.patch(model, logits_dtype=torch.float32, gradient="active"))
    ift.unpatch(model)
    head = model.lm_head.weight.detach().float()
    del model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(head)
    model.lm_head.register_forward_pre_hook(lambda _, args: args[0].float())
    for mine, right, other in zip(got, evaluator(model), rounded, strict=True):
        torch.testing.assert_close(mine.logprob, right.logprob, rtol=0, atol=1e-5)
        assert not torch.equal(mine.logprob, other.logprob)


def test_a_model_that_cannot_share_runs_plain_rows(tokenizer, caplog):
    probes = build_probe_set(rows(), size=4)
    model = causal_lms.make("mistral", vocab_size=len(tokenizer), sliding_window=8)
    check(model, tokenizer, probes, shared=False, tokens_per_forward=150)
    assert "rows of their own" in caplog.text

    model = causal_lms.make("llama", vocab_size=len(tokenizer))
    causal = model.model.forward
    model.model.forward = lambda *a, attention_mask=None, position_ids=None, **k: causal(*a, **k)
    check(model, tokenizer, probes, shared=False)


# Scale and softcap of the first model would make wrong numbers of the second without an error.
def test_an_evaluator_of_several_models(tokenizer):
    probes = build_probe_set(rows(), size=3)
    evaluator = ProbeEvaluator(probes, tokenizer)
    for name, options in (
        ("llama", {}),
        ("gemma2", {"sliding_window": 400}),
        ("mistral", {"sliding_window": 8}),
        ("llama", {}),
    ):
        model = causal_lms.make(name, vocab_size=len(tokenizer), **options)
        wanted = plain(model, tokenizer, probes)
        for one in evaluator(model):
            logprob = wanted[one.probe, one.type]["logprob"]
            torch.testing.assert_close(one.logprob.double(), logprob, rtol=1e-5, atol=1e-5)
        assert evaluator.shares_prompts is (name != "mistral")


# Short groups would pass for such a model: its mask goes by a token's place in the row, up to 256.
def test_a_model_whose_positions_end_before_a_forward(tokenizer):
    config = hf.GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_heads=4, window_size=400,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, initializer_range=0.3,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    long = {str(i): " one two three four cat dog" * 3 for i in range(6)}
    probes = [*build_probe_set(rows(), size=2), Probe("red green " * 10, long)]
    check(hf.GPTNeoForCausalLM(config), tokenizer, probes, shared=False)


# A mask has the square of a forward's tokens: kept for every forward it would fill the memory.
def test_no_mask_is_kept(tokenizer):
    many = {str(i): " one two three four" * 4 for i in range(6)}
    evaluator = ProbeEvaluator([Probe("red", many), Probe("green", many)], tokenizer)
    evaluator(causal_lms.make("llama", vocab_size=len(tokenizer), max_position_embeddings=128))
    held = [v for b in evaluator._batches for v in (*vars(b).values(), *b._inputs.values())]
    kept = [v for v in held if isinstance(v, torch.Tensor)]
    assert evaluator.shares_prompts and sum(t.numel() for t in kept) < 8 * evaluator.tokens


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_length": -1}, ValueError, "max_length: expected at least 1, got -1"),
        ({"max_length": 9.5}, TypeError, "max_length: expected an int"),
        ({"tokens_per_forward": "5"}, TypeError, "tokens_per_forward: expected an int"),
        ({"probes": [{"prompt": "a"}]}, TypeError, r"probes\[0\]: expected a Probe, got dict"),
        ({"probes": [Probe("a", {"x": 3})]}, TypeError, r"probes\[0\]: expected text .* 'x'"),
        ({"probes": []}, DataError, "probes: expected at least one response"),
    ],
)
def test_evaluator_errors(options, error, match, tokenizer):
    with pytest.raises(error, match=match):
        ProbeEvaluator(**{"probes": [Probe("a", {"x": "b"})], "tokenizer": tokenizer, **options})


def test_each_prompt_runs_once(tokenizer):
    probes = [Probe("red green blue one two three", {"a": " cat", "b": " dog bird", "c": " sun"})]
    evaluator = ProbeEvaluator(probes, tokenizer)
    lengths = [len(tokenizer(t)["input_ids"]) for t in probes[0].responses.values()]
    prompt = len(tokenizer(probes[0].prompt)["input_ids"])
    assert evaluator.tokens == prompt + sum(lengths)  # the end token is predicted, never read
    model = causal_lms.make("llama", vocab_size=len(tokenizer))
    evaluator(model)
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda m, a, out: seen.append(out.shape[1])
    )
    evaluator(model)
    hook.remove()
    assert seen == [evaluator.tokens]


def test_probe_set():
    data = rows(20)
    data[3]["chosen_paraphrases"] = ["another way", "a third"]
    data[3]["rejected_semantic"] = "a bad way"

    def sample(prompts):
        return [f"s{i}" if i else "" for i in range(len(prompts))]

    test = [{"prompt": "p", "completion": "far off"}]
    probes, again = (
        build_probe_set(data, size=20, test=test, sample=sample, seed=1) for _ in range(2)
    )
    assert probes == again
    third = probes[3].responses
    assert third["chosen_semantic"] == "another way"
    assert third["rejected_semantic"] == "a bad way"
    assert "sample" not in probes[0].responses and third["sample"] == "s3"
    for probe, row in zip(probes, data, strict=True):
        r = probe.responses
        assert (probe.prompt, r["chosen"], r["rejected"]) == tuple(list(row.values())[:3])
        assert r["unrelated"] == "far off" and r["other_train"] != r["chosen"]
        assert sorted(r["permuted"].split()) == sorted(r["chosen"].split())
        assert r["permuted"].split() != r["chosen"].split()
        assert len(r["random_words"].split()) == len(r["chosen"].split())


def test_other_train_answers_another_prompt():
    """Of rows that share a prompt none is another's; of few different answers one is found."""
    data = [{"prompt": "q", "completion": f"a{i}"} for i in range(9)]
    assert all("other_train" not in p.responses for p in build_probe_set(data, size=9))
    data = [{"prompt": f"q{i}", "completion": "no" if i == 7 else "yes"} for i in range(300)]
    others = [p.responses["other_train"] for p in build_probe_set(data, size=300)]
    assert others == ["yes" if i == 7 else "no" for i in range(300)]


def test_probe_files(tmp_path):
    probes = [Probe("é", {"chosen": "ü"}), Probe([{"role": "user", "content": "q"}], {"b": "c"})]
    write_probes(probes, tmp_path / "p.jsonl")
    assert read_probes(tmp_path / "p.jsonl") == probes
    for line in ("[]", '{"prompt": "a", "responses": {}}', '{"prompt": "a", "responses": {"b": 1}}',
                 '{"prompt": 3, "responses": {"b": "c"}}'):  # fmt: skip
        (tmp_path / "bad.jsonl").write_text(line + "\n")
        with pytest.raises(DataError, match=r"bad.jsonl line 1: "):
            read_probes(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        build_probe_set(rows(), size=0)
    with pytest.raises(TypeError, match="size: expected an int, got float"):
        build_probe_set(rows(), size=2.5)
    with pytest.raises(DataError, match="data: expected at least one row"):
        build_probe_set([])


def test_sampler(tokenizer):
    model = causal_lms.make("llama", vocab_size=len(tokenizer))
    state = torch.get_rng_state()
    draw = sampler(model, tokenizer, max_new_tokens=5, seed=3)
    texts = draw(["red", [{"role": "user", "content": "cat"}]])
    assert texts == draw(["red", [{"role": "user", "content": "cat"}]]) and any(texts)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    with pytest.raises(ValueError, match="temperature: expected a number ≥ 0, got -1"):
        sampler(model, tokenizer, temperature=-1)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        sampler(model, tokenizer, max_new_tokens=0)


def test_sampler_stops_where_positions_end(tokenizer):
    model = causal_lms.make("gpt2", vocab_size=len(tokenizer))  # 64 positions
    longer = "red " * 100
    length = next(n for n in range(1, 99) if len(tokenizer("a" * n)["input_ids"]) >= 62)
    short, full, none = sampler(model, tokenizer, max_new_tokens=5)(["red", "a" * length, longer])
    assert short and none == "" and isinstance(full, str)


# --- in a trainer --------------------------------------------------------------------------------


def trainer(tokenizer, output, callbacks, steps=7, **options):
    torch.manual_seed(0)
    model = causal_lms.make("llama", vocab_size=len(tokenizer))
    made = encode([as_row("x", r["prompt"], r["chosen"]) for r in rows()], tokenizer, 64).examples
    arguments = training_arguments(
        output, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3,
        save_strategy="steps", save_steps=4, **options,
    )  # fmt: skip
    return hf.Trainer(
        model, arguments, train_dataset=made, processing_class=tokenizer, callbacks=callbacks,
        data_collator=ift.data.Collator(tokenizer.pad_token_id),
    )  # fmt: skip


@pytest.mark.pictures
def test_callback_in_a_plain_trainer_and_resumed(tokenizer, tmp_path):
    probes = build_probe_set(rows(), size=3)
    without = trainer(tokenizer, tmp_path / "none", [])
    without.train()

    probe = ProbeCallback(probes, tmp_path / "probe", every=2)
    run = trainer(tokenizer, tmp_path / "run", [probe])
    run.train()
    for a, b in zip(run.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)  # measuring changes nothing
    records = read_records(tmp_path / "probe")
    assert [r["step"] for r in records] == [0, 2, 4, 6, 7]
    assert (tmp_path / "probe" / "curves.png").stat().st_size > 10000
    assert "data:image/png" in (tmp_path / "probe" / "curves.html").read_text(encoding="utf-8")

    # The last record is of the model as it is now.
    wanted = plain(run.model, tokenizer, probes)
    mean = torch.stack([wanted[i, "chosen"]["logprob"].mean() for i in range(3)]).mean().item()
    assert records[-1]["types"]["chosen"]["mean_logprob"] == pytest.approx(mean, abs=1e-5)
    lines = [json.loads(x) for x in (tmp_path / "probe" / "tokens.jsonl").read_text().splitlines()]
    last = next(x for x in lines if (x["step"], x["probe"], x["type"]) == (7, 1, "chosen"))
    assert last["logprob"] == pytest.approx(wanted[1, "chosen"]["logprob"].tolist(), abs=1e-5)
    assert last["greedy"] == wanted[1, "chosen"]["argmax"].tolist()

    # From the checkpoint of step 4, in the directory of a run that went on to 7.
    again = ProbeCallback(probes, tmp_path / "probe", every=2)
    resumed = trainer(tokenizer, tmp_path / "run", [again])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert untimed(read_records(tmp_path / "probe")) == untimed(records)
    assert again.monitor.first == probe.monitor.first


def test_accumulation_and_mixed_precision(tokenizer, tmp_path):
    """Evaluated in the precision that the trainer's forward has, and nothing changes."""
    probes = build_probe_set(rows(), size=3)
    options = {"steps": 3, "gradient_accumulation_steps": 2, "bf16": True}
    without = trainer(tokenizer, tmp_path / "none", [], **options)
    without.train()
    callback = ProbeCallback(probes, tmp_path / "probe", every=2, pictures=False, token_log=False)
    run = trainer(tokenizer, tmp_path / "run", [callback], **options)
    run.train()
    assert [p.name for p in (tmp_path / "probe").iterdir()] == ["curves.jsonl"]
    for a, b in zip(run.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)
    records = read_records(tmp_path / "probe")
    assert [r["step"] for r in records] == [0, 2, 3] and callback.evaluator.shares_prompts
    wanted = plain(run.model, tokenizer, probes)  # whose forward the trainer has put in autocast
    mean = torch.stack([wanted[i, "chosen"]["logprob"].mean() for i in range(3)]).mean().item()
    assert records[-1]["types"]["chosen"]["mean_logprob"] == pytest.approx(mean, abs=1e-5)


class StopAt3(hf.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            control.should_training_stop = True


def test_a_run_that_stops_early_is_measured_at_its_end(tokenizer, tmp_path):
    callback = ProbeCallback(build_probe_set(rows(), size=2), tmp_path / "probe", every=2)
    run = trainer(tokenizer, tmp_path / "run", [callback, StopAt3()])
    run.train()
    assert [r["step"] for r in read_records(tmp_path / "probe")] == [0, 2, 3]


def test_a_second_training_is_compared_with_its_own_start(tokenizer, tmp_path):
    callback = ProbeCallback(build_probe_set(rows(), size=2), tmp_path / "probe", every=2)
    run = trainer(tokenizer, tmp_path / "run", [callback], steps=2)
    run.train()
    run.train()
    first, last = read_records(tmp_path / "probe")
    assert first["squeeze"]["chosen"] == 0 != last["squeeze"]["chosen"]


def test_peft_model(tokenizer, tmp_path):
    """Adapters count, their dropout does not; and the trained copy of a head is the one asked."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    probes = build_probe_set(rows(), size=3)
    options = {"r": 4, "lora_dropout": 0.3, "modules_to_save": ["lm_head"]}
    model = causal_lms.make("llama", vocab_size=len(tokenizer))
    model = causal_lms.lora(model, task_type="CAUSAL_LM", **options)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    check(model, tokenizer, probes)
    assert all(m.training for m in model.modules())


def test_callback_errors(tokenizer, tmp_path):
    probes = build_probe_set(rows(), size=1)
    with pytest.raises(TypeError, match="every: expected an int, got float"):
        ProbeCallback(probes, tmp_path, every=2.5)
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        ProbeCallback(probes, tmp_path, every=0)
    callback = ProbeCallback(probes, tmp_path)
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        callback.on_train_begin(None, hf.TrainerState(), None, model=None)


# --- monitor and guard ---------------------------------------------------------------------------


def types(chosen, greedy):
    return {"chosen": {"mean_logprob": chosen, "greedy_logprob": greedy}}


def test_monitor_flags_squeezing_alone(caplog):
    for last, flag in ((types(-2.5, -0.5), True), (types(-2.5, -1.5), False),
                       (types(-1.5, -0.5), False), (types(-2.005, -0.5), False)):  # fmt: skip
        monitor = SqueezeMonitor()
        assert not monitor.update(0, types(-2.0, -1.0), [])["flag"]
        assert monitor.update(25, last, [])["flag"] is flag
        assert monitor.flagged == (25 if flag else None)
    assert "squeezing at step 25" in caplog.text
    with pytest.raises(ValueError, match="tolerance"):
        SqueezeMonitor(tolerance=-1)
    with pytest.raises(TypeError, match="negative: expected a tuple of types, got 'rejected'"):
        SqueezeMonitor(negative="rejected")


def test_guard_counts_and_masks(tokenizer):
    """Against the same step with the valley's gradients taken out by hand."""
    model = ift.patch(causal_lms.make("llama", vocab_size=len(tokenizer)))
    batch = causal_lms.batch(rows=4, vocabulary=len(tokenizer))
    loss = functools.partial(dpo_loss, beta=0.5)

    def gradients(of):
        model(**batch, loss=of).loss.backward()
        return causal_lms.gradients(model)

    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    logp = logits.log_softmax(-1)
    labels = batch["labels"][:, 1:]
    valid, rejected = labels != -100, torch.arange(4)[:, None] >= 2
    picked = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    half = picked.exp()[valid & rejected].median().item()
    options = {"valley": half * 1.001, "peak": 0.01}
    valley = (picked.exp() <= half * 1.001) & (logp.exp().amax(-1) >= 0.01) & valid & rejected

    free = gradients(loss)
    counting = ValleyGuard(loss, **options)
    same = gradients(counting)
    assert all(torch.equal(same[k], free[k]) for k in free)
    assert counting.negative_tokens == int((valid & rejected).sum())
    assert 0 < counting.valley_tokens == int(valley.sum()) < counting.negative_tokens

    by_hand = torch.where(valley, picked.detach(), picked)
    loss(by_hand, valid).backward()
    wanted = causal_lms.gradients(model)
    masked = gradients(ValleyGuard(loss, mask=True, **options))
    causal_lms.assert_close(masked, wanted, 1e-4)
    assert any((masked[k] - free[k]).abs().max() > 1e-3 * free[k].abs().max() for k in free)
    with pytest.raises(TypeError, match="loss: expected a function"):
        ValleyGuard(3)


def test_callback_in_trl(tokenizer, tmp_path):
    """DPO, where the model is not patched, and squeezing can be seen."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    probes = build_probe_set(rows(), size=3)
    sizes = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    arguments = training_arguments(tmp_path, trl.DPOConfig, bf16=False, **sizes)
    model = causal_lms.make("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    callback = ProbeCallback(probes, tmp_path / "probe", every=2)
    run = trl.DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows()),
        ref_model=copy.deepcopy(model), processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip
    run.train()
    records = read_records(tmp_path / "probe")
    assert [r["step"] for r in records] == [0, 2, 4]
    wanted = plain(run.model, tokenizer, probes)
    mean = torch.stack([wanted[i, "rejected"]["logprob"].mean() for i in range(3)]).mean().item()
    assert records[-1]["types"]["rejected"]["mean_logprob"] == pytest.approx(mean, abs=1e-4)
    assert records[-1]["squeeze"]["negative_tokens"] == sum(
        len(wanted[i, "rejected"]["ids"]) for i in range(3)
    )
