"""`ift train` on data as people have them: notes, truncation, single responses, --dry-run."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
import torch

from chats import HI, TERSE, YES, said
from command_line import read_log, refusal, train, untimed, write_rows
from ift import losses
from ift.cli import main
from ift.cli import options as cli_options
from ift.cli.dry_run import described, lengths, token_text
from ift.cli.losses import build_loss
from ift.cli.preference import PairTrainer
from ift.cli.reference import add_reference
from ift.cli.rows import raw_rows, read_rows, tokenise
from ift.data import Collator, encode
from ift.data_rows import Row, unpaired_row
from ift.one_pass import target_logprobs
from ift.patching import patch
from ift.preference_data import PairCollator, encode_responses
from ift.tiny import tiny_llama, train_tokenizer
from trainers import training_arguments

WORDS = ["red", "blue", "green", "round", "square", "small"]
SMALL = ["--max-steps", 2, "--batch-size", 2, "--max-length", 64]


def single_rows(count=16):
    """The good answer repeats the words asked for, a bad one says others."""
    pick = random.Random(0)
    found = []
    for index in range(count):
        asked = pick.sample(WORDS, 2)
        wrong = pick.sample([w for w in WORDS if w not in asked], 2)
        label = index % 3 != 0
        found.append({"prompt": f"say {' '.join(asked)}:", "label": label,
                      "completion": f" {' '.join(asked if label else wrong)}"})  # fmt: skip
    return found


def parsed(arguments):
    return cli_options.resolve(cli_options.build_parser().parse(list(map(str, arguments))))


# ---- what is said of rows ------------------------------------------------------------------------


def test_a_run_on_renamed_columns_of_parquet(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"question": f"say {w}", "answer": w, "id": i} for i, w in enumerate(WORDS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    more = ["--columns", "instruction=question,output=answer", "--system", "Repeat."]
    command = train(tmp_path / "rows.parquet", tmp_path / "run", *SMALL, *more)
    assert main(command) == 0
    told = capsys.readouterr().err
    assert told.count("keys that nothing reads: id (6 rows, first: ") == 1
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["columns"] == "instruction=question,output=answer"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    out = tokenizer.apply_chat_template(
        [TERSE, HI, YES], return_dict=True, return_assistant_tokens_mask=True
    )
    assert 0 < sum(out["assistant_masks"]) < len(out["input_ids"])
    for changed, problem in (
        (["--columns", "instruction=answer,output=question"], "--columns: got instruction=answer,"),
        (["--system", "Say it."], "--system: got Say it.; expected Repeat., as the run in"),
        (["--truncate", "start"], "--truncate: got start; expected end, as the run in"),
    ):
        assert problem in refusal([*command, "--resume", *changed], capsys)


NOTES = {
    "same": (
        "dpo", [{"prompt": "a", "chosen": "b", "rejected": c} for c in "bcb"],
        "--data: 2 of 3 pairs (first: {} line 1) have the same chosen and rejected response",
    ),
    "the same messages": (
        "orpo", [{"prompt": "a", "chosen": [said("assistant", "b")], "rejected": [
            said("assistant", [{"type": "text", "text": "b"}])]}] * 2,
        "--data: 2 of 2 pairs (first: {} line 1) have the same chosen",
    ),
    "labels": (
        "sft", [{"prompt": "a", "completion": "bc", "label": label} for label in (True, False)],
        "--data: 1 of 2 rows (first: {} line 2) have a false label and are not learned",
    ),
    "keys": (
        "sft", [{"prompt": "a", "completion": "bc", "x": 1, "label": 3},
                {"prompt": "a", "completion": "bc", "x": None, "y": 2},
                {"messages": [HI, YES], "x": 5}],
        "--data: keys that nothing reads: x (2 rows, first: {0} line 1), label (1 row, first: "
        "{0} line 1), y (1 row, first: {0} line 2)",
    ),
    "keys of pairs": (
        "dpo", [{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_paraphrase": "d",
                 "messages": [HI], "score": 0.5}],
        "--data: keys that nothing reads: chosen_paraphrase (1 row, first: {0} line 1), messages "
        "(1 row, first: {0} line 1), score (1 row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTES)
def test_what_is_not_learned_is_counted(tmp_path, capsys, name):
    loss, rows, note = NOTES[name]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found, _ = read_rows(parsed(train(path, tmp_path / "o", "--loss", loss)))
    assert len(found) == len(rows) - (name == "labels")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and note.format(path) in lines[0]


def test_the_files_of_a_folder_are_named(tmp_path, capsys):
    for index in range(9):
        write_rows(tmp_path / f"train-{index}.jsonl", [{"prompt": "a", "completion": "b"}])
    rows, _ = read_rows(parsed(train(tmp_path, "o", "--loss", "sft")))
    names = ", ".join(f"train-{index}.jsonl" for index in range(8))
    note = f"--data: 9 rows in {tmp_path}, of the files {names}, …\n"
    assert len(rows) == 9 and capsys.readouterr().err.endswith(note)


def test_raw_rows(tmp_path):
    """Under the names that `--columns` gives, with their places, without bad responses."""
    rows = [{"q": f"say {i}", "completion": str(i), "label": i != 2, "x": i} for i in range(5)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for loss in ("kto", "sft"):
        command = train(path, tmp_path / "o", "--loss", loss, "--columns", "prompt=q")
        found = raw_rows(parsed(command), path)
        assert [row["x"] for row, _ in found] == [0, 1, 3, 4]
        for row, where in found:
            assert row["prompt"] == f"say {row['x']}" and where == f"{path} line {row['x'] + 1}"


CUT = {
    "end": "2 of 6 rows are longer than --max-length 24 and are cut at their end (first: ",
    "start": "1 of 6 rows are longer than --max-length 24 and are cut at their start",
    "drop": "3 of 6 rows are longer than --max-length 24 and are left out (first: {} line 4)",
}


@pytest.mark.parametrize("how", CUT)
def test_truncated_rows_are_counted(tmp_path, capsys, how):
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "xyz " * 30, "completion": "b"}]
    rows += [{"prompt": "a", "completion": "xyz " * 30}] * 2
    path = write_rows(tmp_path / "rows.jsonl", rows)
    command = train(path, tmp_path / "o", "--truncate", how, "--max-length", 24, "--loss", "sft")
    arguments, tokenizer = parsed(command), train_tokenizer(["no word of these"], 300)
    encoded = tokenise(read_rows(arguments)[0], tokenizer, arguments, "--data", False)
    output = capsys.readouterr().err
    assert "--data: " + CUT[how].format(path) in output
    none = {
        "end": "1 of 6 rows, which have no completion",
        "start": "2 of 6 rows, which have no whole",
    }
    assert ("--data: dropped " in output) == (how in none) and none.get(how, "") in output
    kept = {"end": [0, 1, 2, 4, 5], "start": [0, 1, 2, 3], "drop": [0, 1, 2]}[how]
    assert encoded.indices == kept


BAD = {
    "no key": ("--columns question=prompt", "--columns: got 'question=prompt'; expected KEY"),
    "no column": ("--columns prompt=question", "--data: .*: no row has 'question' for 'prompt'"),
    "system": ("--system x", "--data: .* line 1: a system prompt .* with a row of plain text"),
    "truncate": ("--truncate middle", "--truncate: got 'middle'; expected one of end, drop, start"),
    "weights": ("--loss dpo --desirable-weight 2", "--desirable-weight: got it with --loss dpo"),
    "pairs": ("--loss dpo", "line 1: got 'prompt', 'label', 'completion'; .*--loss kto takes"),
    "none good": ("--data {bad}", "--data: every row has a false label; expected one with true"),
    "evaluation": ("--loss kto --eval-data {pairs}", "--eval-data: got pairs; expected single"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_data(tmp_path, capsys, name):
    given, problem = BAD[name]
    rows = single_rows(4)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    files = {
        "bad": write_rows(tmp_path / "bad.jsonl", [{**row, "label": False} for row in rows]),
        "pairs": write_rows(
            tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        ),
    }
    told = refusal(train(path, tmp_path / "o", *given.format(**files).split()), capsys)
    assert re.search(problem, told) and "Traceback" not in told


# ---- single responses ----------------------------------------------------------------------------


def test_kto_on_single_responses(tmp_path):
    data, output = write_rows(tmp_path / "rows.jsonl", single_rows(18)), tmp_path / "out"
    more = ["--loss", "kto", "--max-steps", 8, "--lr", "2e-3", "--batch-size", 3, "--accumulate", 2]
    more += ["--eval-split", 0.2, "--log-steps", 1, "--save-steps", 4, "--undesirable-weight", 2]
    command = train(data, output, *more)
    assert main(command) == 0
    log = read_log(output)
    assert log[-1]["reward_margin"] > log[0]["reward_margin"] + 0.01
    assert "eval_reward_margin" in log[-1] and "reward_accuracy" not in log[-1]
    (output / "checkpoint-8").rename(tmp_path / "gone")
    assert main([*command, "--resume"]) == 0
    assert untimed(read_log(output)) == untimed(log)


@pytest.fixture(scope="module")
def responses():
    """Encoded responses, five good and two bad ones, with references; and the model."""
    rows = [unpaired_row(row, f"row {i}") for i, row in enumerate(single_rows(7))]
    rows[3] = Row("row 3", rows[3].content, desirable=True)
    tokenizer = train_tokenizer([text for row in rows for text in row.texts], 300)
    return encode_responses(rows, tokenizer, 64), tokenizer


def test_single_responses_are_ktos_formula(tmp_path, responses):
    """Loss and metrics of any batches are those of the formula on all rows."""
    data, tokenizer = responses
    model = tiny_llama(tokenizer, hidden=32, layers=1, seed=1)
    reference = tiny_llama(tokenizer, hidden=32, layers=1)
    add_reference(data, reference, Collator(0), 2, torch.device("cpu"), tmp_path / "cache")
    loss = losses.KTOLoss(beta=0.3, desirable_weight=0.5, undesirable_weight=2.0)
    batch = PairCollator(Collator(0))(data.examples)
    with torch.no_grad():
        patch(model)
        names = ("input_ids", "attention_mask", "labels")
        logprob, mask = target_logprobs(model, **{k: batch[k] for k in names})
        kl_logprob, kl_mask = target_logprobs(model, **{k: batch[f"kl_{k}"] for k in names})
        kl = losses.kto_kl(kl_logprob, kl_mask, batch["kl_reference"])
        desirable = torch.tensor([e["desirable"] for e in data.examples])
        wanted = loss(logprob, mask, desirable, batch["reference"], kl=kl)
    assert desirable.sum() == 5
    for size in (1, 3, 7):
        trainer = PairTrainer(
            model, training_arguments(tmp_path, per_device_eval_batch_size=size,
                                      remove_unused_columns=False),
            loss=loss, single=True, eval_dataset=data.examples,
            data_collator=PairCollator(Collator(0)),
        )  # fmt: skip
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)
        rewards = 0.3 * ((logprob * mask).sum(1) - batch["reference"])
        for name, rows in (("chosen", desirable), ("rejected", ~desirable)):
            assert found[f"eval_reward_{name}"] == pytest.approx(
                rewards[rows].mean().item(), rel=1e-4
            )
    # In training, too, rewards are means over rows, whatever the batches hold.
    for indices in ([0, 1, 2], [3, 4, 5, 6]):
        with torch.no_grad():
            trainer.compute_loss(
                model, PairCollator(Collator(0))([data.examples[i] for i in indices])
            )
    means = trainer._train_metrics()
    assert means["reward_chosen"] == pytest.approx(rewards[desirable].mean().item(), rel=1e-4)
    assert means["reward_margin"] == pytest.approx(
        (rewards[desirable].mean() - rewards[~desirable].mean()).item(), rel=1e-4
    )
    with pytest.raises(ValueError, match="single: expected a loss without pairs, got DPOLoss"):
        PairTrainer(model, training_arguments(tmp_path), loss=losses.DPOLoss(), single=True)


def test_weights_of_responses_reach_the_loss(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", single_rows(3))
    more = ["--loss", "kto", "--desirable-weight", 0.25, "--undesirable-weight", 4]
    loss = build_loss(parsed(train(path, tmp_path / "o", *more)))
    assert loss.options["desirable_weight"] == 0.25 and loss.options["undesirable_weight"] == 4


# ---- --dry-run -----------------------------------------------------------------------------------

DRY = {
    "ift": [{"messages": [HI, YES]}, {"messages": [TERSE, said("user", "how?\n"), YES, HI, YES]},
            {"prompt": "你好 " * 60, "completion": "yes"}, {"prompt": "a", "completion": "b"}],
    "sft": [{"text": "only text"}, {"prompt": "a", "completion": "b"}],
    "dpo": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4,
    "kto": single_rows(4),
}  # fmt: skip


@pytest.mark.parametrize("loss", DRY)
def test_a_dry_run_shows_what_would_be_learned(tmp_path, capsys, monkeypatch, loss):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", DRY[loss])
    more = ["--loss", loss, "--dry-run", "--epochs", 3, "--batch-size", 2, "--accumulate", 2]
    assert main(train("rows.jsonl", "run", *more, "--max-length", 128)) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists() and list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]
    lines = shown.splitlines()
    for line in lines:
        wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
        assert len(line) + wide <= 80, line
    titles = [line for line in lines if line.startswith("rows.jsonl line ")]
    assert len(titles) == {"ift": 3, "sft": 2, "dpo": 6, "kto": 3}[loss]
    steps = f"steps: 3 of {len(DRY[loss])} rows"
    for start in ("tokens per row: min ", "learned: ", steps, "memory: weights ",
                  "time: ", "--truncate end: "):  # fmt: skip
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert "(measured)" in shown
    if loss == "ift":
        assert "more …" in shown
    if loss == "kto":
        assert titles[0].endswith("]") and ", bad response" in titles[0]


def test_a_dry_run_names_the_rows_that_are_left(tmp_path, capsys, monkeypatch):
    """Both responses of a pair have one place, of which one may be dropped."""
    pairs = [{"prompt": p, "chosen": "b", "rejected": "cd " * 9} for p in ("a ", "a " * 9, "a")]
    monkeypatch.chdir(tmp_path)
    path = write_rows(Path("rows.jsonl"), pairs)
    more = ["--loss", "sft", "--responses", "both", "--dry-run", "--max-length", 8]
    for how, lines in (("start", "123"), ("end", "113")):
        assert main(train(path, "o", *more, "--truncate", how)) == 0
        shown = capsys.readouterr().out
        assert re.findall(r"line (\d): \d+ tokens", shown) == list(lines)


def test_described_tokens_are_the_learned_ones():
    tokenizer = train_tokenizer(["say hello hello to  you"], 300)
    (example,) = encode([Row("", {"messages": [HI, said("assistant", "hello\n")]})], tokenizer,
                        64).examples  # fmt: skip
    text = described("row", example, tokenizer)
    title, *body = text.splitlines()
    learned = int((example["labels"] != -100).sum())
    assert title == f"row: {len(example['input_ids'])} tokens, {learned} learned [in brackets]"
    inside = "".join(re.findall(r"\[([^\]]*)\]", "".join(line[2:] for line in body)))
    assert inside == "hello⏎<|end|>⏎"
    pieces = [token_text(i, tokenizer) for i in tokenizer("é\t\u200b")["input_ids"]]
    assert all(unicodedata.category(c)[0] != "C" for piece in pieces for c in piece)


def test_lengths():
    text = lengths([3, 3, 3, 10], 64)
    assert text == "tokens per row: min 3, median 3, max 10 (--max-length 64)\n  3 █      ▃ 10"
    assert lengths([5], 9).endswith("\n  5 █ 5")


def test_a_large_run_is_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ift.cli.dry_run.TIMED", {"cpu": 1e3})
    path = write_rows(tmp_path / "rows.jsonl", DRY["sft"])
    assert main(train(path, tmp_path / "run", "--loss", "sft", "--dry-run")) == 0
    assert re.search(r"time: not measured; about \d\.\de\+\d\d operations", capsys.readouterr().out)
