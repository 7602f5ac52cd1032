"""`ift train` with preference losses: data, reference cache, training, resumption."""

import random

import numpy as np
import pytest
import torch

from command_line import read_log, refusal, train, write_rows
from ift import losses
from ift.cli import main
from ift.cli import options as cli_options
from ift.cli.losses import build_loss
from ift.cli.preference import NAMES, PairTrainer
from ift.cli.reference import add_reference
from ift.data import Collator
from ift.data_rows import DataError, read_preferences, read_rows
from ift.one_pass import target_logprobs
from ift.patching import patch, unpatch
from ift.preference_data import PairCollator, encode_pairs
from ift.tiny import tiny_llama, train_tokenizer
from trainers import training_arguments

WORDS = ["red", "blue", "green", "round", "square", "small"]


def rows(count=24):
    """The chosen answer repeats the words asked for, the rejected one says others."""
    pick = random.Random(0)
    found = []
    for _ in range(count):
        asked = pick.sample(WORDS, 2)
        wrong = pick.sample([w for w in WORDS if w not in asked], 2)
        found.append({"prompt": f"say {' '.join(asked)}:", "chosen": f" {' '.join(asked)}",
                      "rejected": f" {' '.join(wrong)}"})  # fmt: skip
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for row in rows() for text in row.values()], 300)


def test_forms(tmp_path, tokenizer):
    user = {"role": "user", "content": "say red"}
    good, bad = ({"role": "assistant", "content": word} for word in ("red", "blue"))
    earlier = [user, {"role": "assistant", "content": "what?"}, user]
    data = [
        rows(1)[0],
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"messages": [user], "chosen": "red", "rejected": "blue"},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": earlier, "chosen": good, "rejected": bad},
    ]
    path = write_rows(tmp_path / "p.jsonl", data)
    pairs = read_preferences(path)
    encoded = encode_pairs(pairs, tokenizer, 64).examples
    for key in ("input_ids", "labels"):  # three ways to say the same
        for side in ("chosen", "rejected"):
            assert np.array_equal(encoded[1][side][key], encoded[2][side][key])
            assert np.array_equal(encoded[1][side][key], encoded[3][side][key])
    targets = [e["chosen"]["labels"][e["chosen"]["labels"] != -100] for e in encoded]
    assert tokenizer.decode(targets[1]).startswith("red")
    assert np.array_equal(targets[4], targets[1])  # not the assistant's earlier turn
    # The other losses learn the chosen response.
    assert [row.content for row in read_rows(path)] == [pair.chosen.content for pair in pairs]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "got 'prompt', 'chosen'; expected"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen' is empty"),
        ({"prompt": "a", "chosen": 1, "rejected": "c"}, "'chosen' is a number"),
        ([1], "got a JSON array"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
            "expected at least one 'assistant'",
        ),
    ],
)
def test_errors_of_rows(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        read_preferences(write_rows(tmp_path / "p.jsonl", [row]))


def test_mismatched_and_dropped(tmp_path, tokenizer):
    data = rows(3)
    data[1]["prompt"] += " and" * 60  # no room for a response
    pairs = encode_pairs(
        read_preferences(write_rows(tmp_path / "p.jsonl", data)), tokenizer, 40, mismatched=True
    )
    assert len(pairs.examples) == 2 and pairs.dropped[0].endswith("line 2")
    first, second = pairs.examples
    start = int((first["chosen"]["labels"] != -100).argmax())
    assert np.array_equal(first["kl"]["input_ids"][:start], first["chosen"]["input_ids"][:start])
    got = first["kl"]["labels"][first["kl"]["labels"] != -100]
    other = second["chosen"]["labels"]
    assert np.array_equal(got, other[other != -100])
    assert pairs.target_tokens > 0


def test_reference_is_cached_by_model_and_data(tmp_path, tokenizer):
    pairs = encode_pairs(read_preferences(write_rows(tmp_path / "p.jsonl", rows(5))), tokenizer, 64)
    model, collate = tiny_llama(tokenizer, hidden=32, layers=1), Collator(0)
    settings = (collate, 2, torch.device("cpu"), tmp_path / "cache")
    assert not add_reference(pairs, model, *settings)
    batch = PairCollator(collate)(pairs.examples)
    plain = tiny_llama(tokenizer, hidden=32, layers=1)
    with torch.no_grad():
        logp = plain(batch["input_ids"], batch["attention_mask"]).logits.log_softmax(-1)
    labels = batch["labels"][:, 1:]
    each = logp[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = (each * (labels != -100)).sum(1)
    torch.testing.assert_close(batch["reference"], expected, rtol=1e-5, atol=1e-4)
    assert add_reference(pairs, model, *settings)
    with torch.no_grad():
        model.model.norm.weight[0] += 0.1
    assert not add_reference(pairs, model, *settings)
    pairs.examples.pop()
    assert not add_reference(pairs, model, *settings)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3
    assert not add_reference(pairs, model, *settings, bf16=True)  # another precision, other numbers
    for options in ({"logits_dtype": torch.float32}, {"deterministic": True}):
        patch(model, **options)
        assert not add_reference(pairs, model, *settings)
    assert not add_reference(pairs, model, *settings, bf16=True)
    assert add_reference(pairs, patch(unpatch(model)), *settings)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "of other data"])
def test_a_damaged_cache_is_computed_again(tmp_path, tokenizer, damage):
    pairs = encode_pairs(read_preferences(write_rows(tmp_path / "p.jsonl", rows(5))), tokenizer, 64)
    model, cache = tiny_llama(tokenizer, hidden=32, layers=1), tmp_path / "cache"
    settings = (Collator(0), 2, torch.device("cpu"), cache)
    add_reference(pairs, model, *settings)
    wanted = [example.pop("reference") for example in pairs.examples]
    (file,) = cache.glob("*.npy")
    whole = file.read_bytes()
    if damage == "of other data":
        np.save(file, np.zeros(4, np.float32))
    else:
        file.write_bytes({"cut": whole[:-3], "empty": b"", "text": b"not numpy's"}[damage])
    assert not add_reference(pairs, model, *settings)
    assert all(
        np.array_equal(e["reference"], w) for e, w in zip(pairs.examples, wanted, strict=True)
    )
    assert file.read_bytes() == whole and len(list(cache.iterdir())) == 1


def test_a_reference_of_other_tokens_is_refused(tmp_path, tokenizer, capsys):
    data, other = write_rows(tmp_path / "p.jsonl", rows(4)), tmp_path / "other"
    strange = train_tokenizer(["quite other text, of which other pairs are frequent"] * 9)
    for part in (tiny_llama(strange, hidden=32, layers=1), strange):
        part.save_pretrained(other)

    def run(output, reference):
        more = ["--loss", "dpo", "--max-steps", 1, "--reference", reference]
        return train(data, tmp_path / output, *more)

    error = refusal(run("a", other), capsys).strip().splitlines()[-1]
    assert f"--reference: {other}: the token " in error and "expected" in error
    assert "--reference: cannot load" in refusal(run("b", tmp_path / "x"), capsys)
    same = train_tokenizer([text for row in read_preferences(data) for text in row.texts])
    for part in (tiny_llama(same, hidden=32, layers=1), same):
        part.save_pretrained(other)
    assert main(run("c", other)) == 0


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_bf16_policy_and_reference_start_equal(tmp_path, loss):
    """Before the first update both are one model, whose log-ratios are 0 but for the padding."""
    data = write_rows(tmp_path / "p.jsonl", rows(8))
    rewards = {}
    for precision in ("--bf16", "--no-bf16"):
        output = tmp_path / precision
        sizes = ["--max-steps", 1, "--batch-size", 8, "--log-steps", 1, "--beta", 1]
        assert main(train(data, output, "--loss", loss, *sizes, precision)) == 0
        (record,) = read_log(output)
        rewards[precision] = max(abs(record["reward_chosen"]), abs(record["reward_rejected"]))
    assert rewards["--no-bf16"] < 1e-5
    assert rewards["--bf16"] < 1e-4  # 1e-3 beside a reference in float32


OPTIONS = {
    "dpo": ["--dpo-kind", "ipo", "--nll-weight", "0.5"],
    "kto": ["--length-normalized", "--beta", "0.5"], "orpo": ["--nll-weight", "0.5"],
    "simpo": ["--margin", "0.5"], "cpo": ["--label-smoothing", "0.1"], "slic": ["--beta", "0.5"],
}  # fmt: skip


DRAWN = {"dpo", "kto"}  # with log-probabilities and without


@pytest.mark.parametrize(
    "loss", [pytest.param(x, marks=[pytest.mark.pictures] * (x in DRAWN)) for x in OPTIONS]
)
def test_training_widens_the_margin(tmp_path, loss):
    data, output = write_rows(tmp_path / "p.jsonl", rows()), tmp_path / "out"
    more = ["--loss", loss, "--max-steps", 12, "--lr", "2e-3", "--batch-size", 4]
    more += ["--accumulate", 2, "--eval-split", 0.2, "--log-steps", 3, "--save-steps", 6]
    command = train(data, output, *more, *OPTIONS[loss])
    assert main(command) == 0
    log = read_log(output)
    assert log[-1]["reward_margin"] > log[0]["reward_margin"]
    assert log[-1]["logprob_chosen" if loss != "kto" else "reward_chosen"] is not None
    assert any("eval_reward_margin" in record for record in log)
    assert loss not in DRAWN or (output / "curves.png").stat().st_size > 10_000
    assert (output / "reference").exists() == (loss in ("dpo", "kto"))
    if loss == "dpo":  # the same numbers after an interruption, the reference from the cache
        before = [record["loss"] for record in log]
        (output / "checkpoint-12").rename(tmp_path / "gone")
        assert main([*command, "--resume"]) == 0
        assert [record["loss"] for record in read_log(output)] == before
        assert len(list((output / "reference").glob("*.npy"))) == 2  # training and evaluation


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--loss sft --beta 1", "--beta: got it with --loss sft; expected --loss dpo"),
        ("--loss dpo --dpo-kind x", "--dpo-kind: expected one of"),
        ("--loss orpo --reference x", "--reference: got it with --loss orpo"),
        ("--loss dpo --gamma 0.5", "--gamma: got it with --loss dpo"),
        (
            "--loss dpo --dpo-kind aot --accumulate 2",
            "--dpo-kind: got aot, which sorts all pairs of a step; expected --accumulate 1",
        ),
    ],
)
def test_errors_of_arguments(tmp_path, capsys, arguments, said):
    data = write_rows(tmp_path / "p.jsonl", rows(4))
    error = refusal(train(data, tmp_path / "o", *arguments.split()), capsys).strip().splitlines()
    assert said in error[-1]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dpo", {}),
        ("dpo", {"dpo_kind": "aot"}),
        ("kto", {}),
        ("kto", {"length_normalized": True}),
        ("cpo", {"nll_weight": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_evaluation_is_that_of_all_pairs_at_once(tmp_path, tokenizer, loss, options):
    """Whatever the batches are, one reference point and one order included."""
    path = write_rows(tmp_path / "p.jsonl", rows(5))
    pairs = encode_pairs(read_preferences(path), tokenizer, 64, mismatched=loss == "kto")
    collate = Collator(0)
    more = [x for k, v in options.items() for x in ("--" + k.replace("_", "-"), v) if x is not True]
    given = train(path, tmp_path, "--loss", loss, *more)
    parsed = cli_options.resolve(cli_options.build_parser().parse(given))
    model = tiny_llama(tokenizer, hidden=32, layers=1, seed=1)
    if loss != "cpo":
        reference = tiny_llama(tokenizer, hidden=32, layers=1)
        add_reference(pairs, reference, collate, 2, torch.device("cpu"), tmp_path / "cache")
    found = []
    for size in (1, 2, 5):
        arguments = training_arguments(
            tmp_path, per_device_eval_batch_size=size, remove_unused_columns=False
        )
        trainer = PairTrainer(
            model, arguments, loss=build_loss(parsed), eval_dataset=pairs.examples,
            data_collator=PairCollator(collate),
        )  # fmt: skip
        found.append(trainer.evaluate())
    with torch.no_grad():
        batch = PairCollator(collate)(pairs.examples)
        whole = trainer.compute_loss(model.eval(), batch)
        if loss == "kto":
            batch["kl_reference"] = batch["kl_reference"] - 50  # for a point above 0
            trainer.compute_loss(model, batch)
            kl = target_logprobs(model, **{name: batch[f"kl_{name}"] for name in NAMES})
            wanted = losses.kto_kl(*kl, batch["kl_reference"], **options)
            assert wanted > 0 and trainer.pair_loss.metrics["kl"] == pytest.approx(wanted.item())
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(whole.item(), rel=1e-5)
        for name in ("eval_reward_chosen", "eval_logprob_chosen", "eval_token_accuracy"):
            if name in found[0]:
                assert metrics[name] == pytest.approx(found[0][name], rel=1e-5, abs=1e-7)


def test_the_reference_has_the_options_of_the_policy(tmp_path):
    """Its numbers are kept by what they depend on."""
    data = write_rows(tmp_path / "p.jsonl", rows(4))
    size = ["--batch-size", "4", "--max-length", "48", "--max-steps", "1", "--loss", "dpo"]
    names = set()
    for given in ([], ["--logits-dtype", "float32"], ["--deterministic"]):
        output = tmp_path / str(len(names))
        assert main(train(data, output, *size, "--bf16", *given)) == 0
        names |= {path.name for path in (output / "reference").glob("*.npy")}
    assert len(names) == 3
