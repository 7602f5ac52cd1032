"""`ift score`: what it writes is what full logits say, however often it is stopped."""

import json
import math
import shutil

import pytest
import torch

from command_line import read_log, refusal, write_rows
from ift.cli import main
from ift.cli import score as command
from ift.losses import TopKDistillationLoss
from ift.teacher_shards import TeacherCollator, TeacherDataset
from ift.tiny import tiny_llama, train_tokenizer

LENGTH, K = 32, 6
ROWS = [{"prompt": f"count {i}:", "completion": f" {i}" * (1 + i % 4)} for i in range(11)]


def arguments(data, output, *more):
    given = ["score", data, "--model", "tiny", "--cpu", "--max-length", LENGTH, "--batch-size", 3]
    return [*map(str, [*given, "--output", output, *more])]


def model_of(rows):
    """The model and tokenizer that ``--model tiny`` is for these rows."""
    tokenizer = train_tokenizer(row[key] for row in rows for key in ("prompt", "completion"))
    return tiny_llama(tokenizer, max_length=LENGTH).eval(), tokenizer


def files(output):
    """The contents of every file, by name; the data may be elsewhere."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name != "score.json"}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The rows of the file, and the output of a run on four shards."""
    directory = tmp_path_factory.mktemp("scored")
    data = write_rows(directory / "rows.jsonl", ROWS)
    assert main(arguments(data, directory / "out", "--topk", K, "--shard-rows", 3)) == 0
    return data, directory / "out"


def test_scores_and_shards_are_those_of_full_logits(scored):
    _, output = scored
    model, tokenizer = model_of(ROWS)
    data, lines = TeacherDataset(output, vocabulary=len(tokenizer)), []
    for number in range(4):
        lines += read_log(output, f"scores-{number:05d}.jsonl")
    assert len(lines) == len(data) == len(ROWS) and data.k == K
    total = count = 0
    for line, example, row in zip(lines, data, ROWS, strict=True):
        (answer,) = line["answers"]
        prompt, end = tokenizer(row["prompt"]).input_ids, tokenizer.eos_token_id
        ids = torch.tensor([*prompt, *tokenizer(row["completion"]).input_ids, end])
        assert example["input_ids"].tolist() == ids.tolist()
        assert answer["token_ids"] == ids[len(prompt) :].tolist()
        with torch.no_grad():
            logp = model(ids[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        own = logp.gather(-1, ids[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer["token_logprobs"]).double(), own)
        assert answer["logprob"] == pytest.approx(own.sum().item(), rel=1e-5)
        best = example["teacher_ids"].long()
        values = logp.topk(K).values.float()
        torch.testing.assert_close(example["teacher_logprob"], values)
        torch.testing.assert_close(logp.gather(-1, best).float(), values)
        rest = logp.scatter(-1, best, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(example["teacher_tail_logprob"], rest.float())
        total, count = total + own.sum().item(), count + len(own)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows"], summary["tokens"], summary["accuracy"]) == (len(ROWS), count, None)
    assert summary["perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-5)


def test_the_teacher_is_at_no_distance_from_itself(scored):
    """Batches have the teacher at the positions of the hidden states that predict the labels."""
    _, output = scored
    model, tokenizer = model_of(ROWS)
    loader = torch.utils.data.DataLoader(
        TeacherDataset(output), batch_size=4, collate_fn=TeacherCollator(tokenizer.pad_token_id)
    )
    loss, tokens = TopKDistillationLoss(), 0
    for batch in loader:
        hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        value = loss.from_hidden(
            hidden, model.lm_head.weight, batch["target"], batch["teacher_ids"],
            batch["teacher_logprob"], teacher_tail_logprob=batch["teacher_tail_logprob"],
        )  # fmt: skip
        assert abs(value.item()) < 1e-6
        tokens += int(loss.metrics["tokens"])
    assert tokens == json.loads((output / "summary.json").read_text())["tokens"]


def test_a_run_that_was_stopped_continues_and_processes_share_the_rows(
    scored, tmp_path, monkeypatch, capsys
):
    data, output = scored
    again = tmp_path / "again"
    shutil.copytree(output, again)
    for name in ("scores-00001.jsonl", "summary.json", "index.json", "topk-00001.safetensors"):
        (again / name).unlink()
    with pytest.raises(ValueError, match=r"directory: no index.json can be read in"):
        TeacherDataset(again)
    computed, score = [], command.score
    monkeypatch.setattr(command, "score", lambda *a, **k: computed.extend(a[1]) or score(*a, **k))
    given = ("--topk", K, "--shard-rows", 3)
    assert main(arguments(data, again, *given)) == 0
    assert "3 of 4 shards" in capsys.readouterr().err and len(computed) == 3
    assert files(again) == files(output)

    both = tmp_path / "both"
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun; they never wait for each other
    for rank, there in ((1, False), (0, True)):
        monkeypatch.setenv("RANK", str(rank))
        assert main(arguments(data, both, *given)) == 0
        assert (both / "summary.json").exists() == there
    assert files(both) == files(output)


def test_what_another_run_left_is_refused(scored, capsys):
    data, output = scored
    for more, said in (
        (("--shard-rows", 3), "scores of another --topk"),
        (("--topk", K), "scores of another --shard-rows"),
        (("--topk", K, "--shard-rows", 3, "--seed", 1), "scores of other weights, rows or"),
    ):
        found = refusal(arguments(data, output, *more), capsys)
        assert f"--output: {output} has {said}" in found


CHOICES = [
    {"prompt": "red or", "choices": [" blue", " green blue"], "answer": 1},
    {"prompt": "red or", "choices": [" blue", " green blue"], "answer": " blue"},
    {"prompt": "red or", "choices": [" blue", " blue", " red"]},
    {"prompt": "red or", "chosen": " blue", "rejected": " green"},
    {"prompt": "red or", "completion": " blue"},
]


def test_choices_and_preferences(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", CHOICES)
    assert main(arguments(data, tmp_path / "out")) == 0
    lines = read_log(tmp_path / "out", "scores-00000.jsonl")
    assert [line.get("label") for line in lines] == [1, 0, None, 0, None]
    assert [len(line["answers"]) for line in lines] == [2, 2, 3, 2, 1]
    blue = lines[4]["answers"][0]["logprob"]
    for line in lines[:4]:
        values = [answer["logprob"] for answer in line["answers"]]
        assert values[0] == pytest.approx(blue) and line["best"] == values.index(max(values))
        means = [answer["logprob"] / answer["tokens"] for answer in line["answers"]]
        assert line["best_per_token"] == means.index(max(means))
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    right = [line["best"] == line["label"] for line in lines if line.get("label") is not None]
    assert (found["choices"], found["accuracy"]) == (3, sum(right) / 3)
    single = [lines[0]["answers"][1], lines[1]["answers"][0], lines[3]["answers"][0],
              lines[4]["answers"][0]]  # fmt: skip
    assert found["logprob"] == pytest.approx(sum(answer["logprob"] for answer in single))


def test_changed_answers_are_refused_and_other_columns_are_read(tmp_path, capsys):
    """The tokens are the same: only the right answer is another."""
    rows = [
        {"question": "red or", "endings": [" blue", " green"], "gold": 0, "text": "a", "id": 3},
        {"question": "red or", "chosen": " blue", "rejected": " blue"},
    ]
    names = ("--columns", "prompt=question,choices=endings,answer=gold")
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    assert main(arguments(write_rows(data, rows), output, *names)) == 0
    said = capsys.readouterr().err
    assert "keys that nothing reads: id (1 row" in said
    assert "1 of 2 rows have the same chosen and rejected response" in said
    lines = read_log(output, "scores-00000.jsonl")
    assert [line["label"] for line in lines] == [0, None] and len(lines[0]["answers"]) == 2
    rows[0]["gold"] = 1
    said = refusal(arguments(write_rows(data, rows), output, *names), capsys)
    assert f"--output: {output} has scores of other right answers" in said


def test_what_is_damaged_or_not_finite_shows(scored, tmp_path, capsys):
    data, output = scored
    again, given = tmp_path / "again", ("--topk", K, "--shard-rows", 3)
    shutil.copytree(output, again)
    (again / "topk-00001.safetensors").unlink()
    assert main(arguments(data, again, *given)) == 0
    assert "3 of 4 shards" in capsys.readouterr().err and files(again) == files(output)
    (again / "scores-00002.jsonl").write_text("")
    found = refusal(arguments(data, again, *given), capsys)
    assert "scores-00002.jsonl is damaged; expected whole files" in found

    answers = [{"logprob": value, "tokens": 1} for value in (math.nan, -1.0)]
    assert command._best(answers) is None
    answers[0]["logprob"] = None  # as JSON has it
    line = {"answers": answers, "label": 1, "best": None, "best_per_token": None}
    found = command.summary([line])
    assert found["accuracy"] is None and found["not_finite"] == found["choices"] == 1


def test_columns_name_choices_and_their_answer(tmp_path):
    """Under other names, beside a column that would be another format; `completion` chosen too."""
    rows = [
        {"question": "red or", "options": row["choices"], "gold": row["answer"], "completion": "x"}
        for row in CHOICES[:2]
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    names = "prompt=question,choices=options,answer=gold"
    assert main(arguments(data, tmp_path / "out", "--columns", names)) == 0
    lines = read_log(tmp_path / "out", "scores-00000.jsonl")
    assert [(line["label"], len(line["answers"])) for line in lines] == [(1, 2), (0, 2)]
    data = write_rows(tmp_path / "both.jsonl", [{**CHOICES[0], "completion": " blue"}])
    given = arguments(data, tmp_path / "one", "--columns", "prompt,completion")
    assert main(given) == 0
    assert len(read_log(tmp_path / "one", "scores-00000.jsonl")[0]["answers"]) == 1


def test_columns_that_nothing_reads_are_refused(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    given = arguments(data, tmp_path / "out", "--topk", 2, "--columns", "prompt,choices=completion")
    assert "--columns: got 'choices' with --topk" in refusal(given, capsys)
    given = ["train", "--columns", "choices=completion", "--data", data]
    assert "KEY one of messages" in refusal(given, capsys)


REFUSED = [
    ({"prompt": "a", "choices": ["b"]}, (), "'choices' is 1; expected an array of at least 2"),
    ({"prompt": "a", "choices": "b"}, (), "'choices' is a string; expected an array"),
    ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, (), "'answer' is 2; expected the text"),
    ({"prompt": "a", "choices": ["b", "c"], "answer": "A"}, (), "'answer' is 'A'; expected"),
    ({"prompt": "a", "choices": ["b", "c"], "completion": "b"}, (), "'choices' and 'completion'"),
    ({"text": "a", "choices": ["b", "c"]}, (), "got 'choices' and 'text'; expected"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "choices": ["b", "c"]}, (), "and 'chosen'"),
    ({"prompt": "a", "choices": ["b", "c"], "label": 1}, (), "got 'choices' and 'label'; expected"),
    ({"choices": ["b", "c"]}, (), "got 'choices' without 'prompt'"),
    ({"prompt": "a", "choices": ["b", "b"], "answer": 1}, (), "a choice that is there twice"),
    ({"prompt": "", "choices": ["b", "c"]}, (), "first token of an answer is predicted from noth"),
    ({"prompt": "a", "choices": ["b", 3]}, (), "choices[1] is a number; expected a string"),
    ({"prompt": "a", "choices": ["b", "c"]}, ("--topk", "4"), "got 'prompt', 'choices'"),
    (
        {"prompt": "a", "choices": ["b", " ".join("qwertyuiopasdfghjklzxcvbnm" * 2)]},
        (),
        "--max-length: got 32, less than an answer",
    ),
    ({"prompt": "a", "completion": "b"}, ("--topk", "511"), "--topk: got 511; expected at most"),
    ({"prompt": "a", "completion": "b"}, ("--topk", "512"), "expected a whole number from 1 to"),
]


@pytest.mark.parametrize(("row", "more", "said"), REFUSED)
def test_what_is_refused(row, more, said, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [row])
    assert said in refusal(arguments(data, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()
