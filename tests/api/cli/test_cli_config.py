"""Options from a file, runs repeated from their `run.json`, and runs that are resumed with it."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command_line import read_log, refusal, train, untimed, write_rows
from ift.cli import main, options
from ift.cli.config_file import saved_options

ROWS = [{"prompt": f"count {i} to {i + 2}:", "completion": f" {i} {i + 1}"} for i in range(12)]
CALL = ["train", "--model", "m", "--data", "d", "--output", "o"]


def resolved(*arguments):
    return options.resolve(options.build_parser().parse(list(map(str, arguments))))


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# ---- the file ------------------------------------------------------------------------------------


def test_the_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = written(
        tmp_path / "run.yaml",
        "model: m\ndata: d\nloss: ift\npreset: paper\nlr: 5e-6\nmax-grad-norm: 2\nlam_noise: .25\n"
        "bf16: no\ndropout: on\nseed: null\nlr-warmup-steps: 4\n",
    )
    found = resolved("train", "--config", file, "--output", "o", "--lr", 1, "--max-steps", 9)
    assert (found.model, found.data, found.output) == ("m", "d", "o")
    assert (found.lr, found.max_grad_norm, found.lam_noise) == (1, 2, 0.25)
    assert (found.optimizer, found.accumulate) == ("rmsprop", 64)  # of the preset
    assert found.bf16 is False and found.dropout is True and found.seed == 0
    # What excludes an option of a lower rank replaces it.
    assert (found.lr_warmup_steps, found.warmup_ratio) == (4, None)
    assert (found.max_steps, found.epochs) == (9, None)
    assert resolved(*CALL, "--config", file, "--warmup-ratio", 0.5).lr_warmup_steps is None
    as_json = written(tmp_path / "run.json", json.dumps({"lr": 5e-7, "epochs": 2, "bf16": True}))
    found = resolved(*CALL, "--config", as_json)
    assert (found.lr, found.epochs, found.bf16) == (5e-7, 2.0, True)
    assert resolved(*CALL, "--config", written(tmp_path / "none.yaml", "# nothing\n")).lr == 5e-5


BAD = {
    "lerning-rate: 1": "unknown option 'lerning-rate'; expected those of the command line",
    "max_grad_nrom: 1": ".*'max_grad_nrom'; .*, did you mean max_grad_norm",
    "resume: true": "resume belongs on the command line; expected --resume there",
    "config: x": "config belongs on the command line; expected --config there",
    "dry-run: yes": "dry_run belongs on the command line; expected --dry-run there",
    "probe-size: 3": "probe_size is an option of `ift dynamics run`; expected those of `ift train`",
    "lr: fast": "lr: got 'fast'; expected a number above 0",
    "lr: true": "lr: got true; expected text or a number",
    "lam: 1.5": r"lam: got '1.5'; expected λ in \[0, 1\]",
    "max_steps: 2.0": "max_steps: got '2.0'; expected a whole number of at least 1",
    "optimizer: adam": "optimizer: got 'adam'; expected one of adamw, rmsprop",
    "optimizer: off": "optimizer: got false; expected one of adamw",
    "bf16: 1": "bf16: got 1; expected true or false",
    "data: [a, b]": r'data: got \["a", "b"\]; expected text or a number',
    "lr: 1\nlr: 2": "is damaged .ValueError: lr is there twice",
    "max-steps: 1\nmax_steps: 1": "max_steps is there twice; expected it once",
    "- lr": "got list; expected options",
    "lr": "got str; expected options",
    "lr: [1": "is damaged .ValueError: .*line 1",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_one_line(text, tmp_path, capsys):
    file = written(tmp_path / "run.yaml", text)
    said = refusal([*CALL, "--config", str(file)], capsys)
    assert re.match(f"ift: --config: {re.escape(str(file))}:? {BAD[text]}", said), said
    assert said.count("\n") == 1


def test_files_that_are_none(tmp_path, capsys):
    said = refusal([*CALL, "--config", str(tmp_path / "no.yaml")], capsys)
    assert f"--config: {tmp_path / 'no.yaml'}: No such file" in said
    for text in ('{"lr": 1, "lr": 2}', "{broken", "[1]"):
        file = written(tmp_path / "run.json", text)
        said = refusal([*CALL, "--config", str(file)], capsys)
        assert said.startswith(f"ift: --config: {file}") and said.count("\n") == 1
    file = written(tmp_path / "lr.yaml", "epochs: 1\nmax_steps: 2\n")
    said = refusal([*CALL, "--config", str(file)], capsys)
    assert "--config: max_steps: got it beside --epochs; expected one of the two" in said
    written(file, "k: 3\nrule: kth\n")
    said = refusal([*CALL, "--config", str(file), "--rule", "greedy"], capsys)
    assert said == "ift: --config: k: got it with --rule greedy; expected --rule kth\n"
    said = refusal(["train", "--config", str(written(file, "model: m\n"))], capsys)
    assert said == "ift: train: the following arguments are required: --data, --output\n"


# ---- runs ----------------------------------------------------------------------------------------

SIZES = ["--batch-size", "4", "--max-length", "32", "--lr", "3e-3", "--log-steps", "1",
         "--eval-split", "0.25", "--eval-steps", "3"]  # fmt: skip
CONSTANT = [*SIZES, "--scheduler", "constant", "--rule", "sample", "--lam-noise", "0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Runs of 3 and of 5 steps with a constant learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    for steps in (3, 5):
        assert main(train(data, folder / str(steps), *CONSTANT, "--max-steps", steps)) == 0
    return folder


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def assert_same(output, other):
    """Records and weights, to the last bit."""
    assert untimed(read_log(output)) == untimed(read_log(other))
    theirs = weights(other)
    assert all(value.equal(theirs[name]) for name, value in weights(output).items())


def test_a_run_is_repeated_from_its_run_json(runs, data, tmp_path, monkeypatch, capsys):
    saved = json.loads((runs / "3" / "run.json").read_text())
    assert saved["data"] == data and saved["rule"] == "sample" and saved["cpu"] is True
    assert saved["epochs"] is None and "output" not in saved and "probe_every" not in saved
    monkeypatch.chdir(tmp_path)
    (runs / "two.json").write_text(json.dumps({**saved, "processes": 2}))
    given = ["train", "--config", str(runs / "two.json"), "--output", "again"]
    assert main(given) == 0
    assert "two.json is of a run in 2 processes, this one has 1" in capsys.readouterr().err
    assert_same(tmp_path / "again", runs / "3")
    assert json.loads((tmp_path / "again" / "run.json").read_text()) == saved
    copy = shutil.copy(data, tmp_path / "rows.jsonl")
    changed = {**saved, "data": str(copy)}
    file = written(tmp_path / "changed.json", json.dumps(changed))
    write_rows(copy, ROWS[:-1])
    given = ["train", "--config", str(file), "--output", "third"]
    said = refusal(given, capsys)
    assert f"--config: {file}: {copy} has other contents than when that run was started" in said
    assert main([*given, "--data", str(copy), "--max-steps", "1"]) == 0


def test_the_defaults_in_a_run_json_contradict_nothing(data, tmp_path, capsys):
    """Whatever the run was, and where the command line changes the loss."""
    file, call = (
        tmp_path / "run.json",
        ["train", "--config", tmp_path / "run.json", "--output", "o"],
    )
    for first, then in (
        ("--loss sft", ""),
        ("--loss dpo", ""),
        ("--loss kto --eval-split 0.1", ""),
        ("--loss ift", "--loss simpo"),
        ("--loss sft --eval-split 0.1", "--loss dpo"),
        ("--loss ift --preset paper --no-bf16", "--lr 1"),
    ):
        given = resolved("train", "--model", "m", "--data", data, "--output", "o", *first.split())
        saved = saved_options(given, options.known_options(given))
        written(file, json.dumps(saved))
        found = vars(resolved(*call, *then.split()))
        differ = {name for name, value in found.items() if value != getattr(given, name)}
        assert differ == {"config", *(word[2:] for word in then.split()[::2])}
    # Given on the command line, or with another value, they do.
    call = [*map(str, call), "--loss", "dpo"]
    written(file, json.dumps({**saved, "preset": None, "objective": None}))
    assert "--responses: got it with --loss dpo" in refusal(
        [*call, "--responses", "chosen"], capsys
    )
    written(file, json.dumps({**saved, "preset": None, "objective": None, "responses": "both"}))
    assert "--config: responses: got it with --loss dpo" in refusal(call, capsys)


def test_intervals_of_a_resumed_run_may_change(runs, tmp_path, capsys):
    shutil.copytree(runs / "3", tmp_path / "run")
    given = ["--max-steps", "7", "--log-steps", "2", "--save-steps", "5", "--eval-steps", "7"]
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), *given]) == 0
    assert [record["step"] for record in read_log(tmp_path / "run")] == [1, 2, 3, 4, 6, 7]
    found = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert found == {"checkpoint-5", "checkpoint-7"}


def test_a_checkpoint_that_is_not_whole_is_refused(runs, tmp_path, capsys):
    shutil.copytree(runs / "3", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    resume = ["train", "--resume", "--output", str(tmp_path / "run"), "--max-steps", "4"]
    for size, name in enumerate(("rng_state.pth", "scheduler.pt", "optimizer.pt")):
        file = checkpoint / name
        file.rename(tmp_path / name)
        said = refusal(resume, capsys)
        assert said == f"ift: --resume: {checkpoint} is damaged (no {name})\n"
        whole = (tmp_path / name).read_bytes()
        file.write_bytes(whole[: len(whole) * size // 3])
        said = refusal(resume, capsys).splitlines()[-1]
        assert said.startswith(f"ift: --resume: {checkpoint} is damaged (")
        file.write_bytes(whole)


def test_no_model_is_written_over(runs, data, tmp_path, capsys):
    """Neither the one that is trained or the reference, nor what is of no run."""
    base = shutil.copytree(runs / "3" / "model", tmp_path / "w" / "model")
    (tmp_path / "thesis" / "model").mkdir(parents=True)
    (tmp_path / "link" / "model").parent.mkdir()
    (tmp_path / "link" / "model").symlink_to(tmp_path / "nowhere")
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    few = ["--max-steps", "1", "--resume"]
    dpo = ["--loss", "dpo", "--reference", base, *few]
    for arguments, said in (
        (train(data, tmp_path / "w", model=base), "which --model is in; expected another"),
        (train(data, tmp_path / "w", *few, model=base), "which --model is in; expected another"),
        (train(pairs, tmp_path / "w", *dpo), "which --reference is in; expected another"),
        (train(data, tmp_path / "w", *few), "expected a new directory"),
        (train(data, tmp_path / "thesis"), "expected a new directory"),
        (train(data, tmp_path / "link"), "expected a new directory"),
    ):
        text = refusal(arguments, capsys)
        assert text.startswith("ift: --output: the trained model would replace ") and said in text
    assert (base / "model.safetensors").exists()
    run = shutil.copytree(runs / "3", tmp_path / "run")  # as older versions could have started it
    saved = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**saved, "model": str(run / "model")}))
    resume = ["train", "--resume", "--output", str(run), "--max-steps", "5"]
    assert "which --model is in" in refusal(resume, capsys)


def test_a_resumed_run_needs_no_other_option(runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs / "3", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "--output", "run"]) == 0
    said = "complete at step 3 of 3 (epoch 1.00); a larger --epochs or --max-steps continues it"
    assert said in capsys.readouterr().err
    assert main(["train", "--resume", "--output", "run", "--max-steps", "5"]) == 0
    said = capsys.readouterr().err
    assert "resuming at step 3 of 5 (epoch 1.00)" in said and "learning rate is" not in said
    theirs = weights(runs / "5")
    assert all(value.equal(theirs[name]) for name, value in weights(tmp_path / "run").items())
    mine, unbroken = (untimed(read_log(path)) for path in (tmp_path / "run", runs / "5"))
    assert mine == unbroken
    assert json.loads((tmp_path / "run" / "run.json").read_text())["max_steps"] == 5


def test_what_a_resumed_run_refuses(runs, data, tmp_path, capsys):
    shutil.copytree(runs / "3", tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    before = file.read_text()
    resume = ["train", "--resume", "--output", str(tmp_path / "run")]
    for given, said in {
        "--lr 1": "--lr: got 1.0; expected 0.003, as the run in",
        "--loss sft": "--loss: got sft; expected ift, as the run in",
        "--gamma 0.5": "--gamma: got 0.5; expected the default, as the run in",
        "--no-dropout": "--dropout: got False; expected True, as the run in",
        "--max-steps 2": "--max-steps: got 2; expected at least 3, as the run in",
        "--epochs 9": "--epochs: got 9.0; expected --max-steps, as the run in",
        "--data /nowhere.jsonl": "--data: no file /nowhere.jsonl; expected the data of the run in",
        "--warmup-ratio 0.5": "--warmup-ratio: got 0.5; expected the default, as",
    }.items():
        assert said in refusal([*resume, *given.split()], capsys)
    other = write_rows(tmp_path / "rows.jsonl", ROWS[1:])
    said = refusal([*resume, "--data", other], capsys)
    assert "--data: other contents than when the run in" in said
    file.write_text(before.replace(data, "/gone/rows.jsonl"))
    assert "--data: no file /gone/rows.jsonl; expected the data of" in refusal(resume, capsys)
    assert main([*resume, "--data", data, "--log-steps", "2"]) == 0  # its new place
    file.write_text(before.replace('"seed"', '"sead"'))
    assert f"--resume: {file}: unknown option 'sead'" in refusal(resume, capsys)
    file.unlink()
    said = refusal(resume, capsys)
    output = tmp_path / "run"
    expected = f"no run.json in {output}; expected the output of a run, or --model and --data"
    assert said == f"ift: --resume: {expected}\n"
    assert f"--resume: {output} is damaged (no run.json)" in refusal(
        train(data, output, *CONSTANT, "--max-steps", 3, "--resume"), capsys
    )


def test_epochs_can_grow_and_the_schedule_is_the_new_one(data, tmp_path, capsys):
    given = train(data, tmp_path / "run", *SIZES[:-4], "--scheduler", "linear", "--loss", "sft",
                  "--warmup-ratio", "0.5")  # fmt: skip
    assert main([*given, "--epochs", "1"]) == 0
    assert [r["lr"] for r in read_log(tmp_path / "run")] == pytest.approx([0, 0.0015, 0.003])
    capsys.readouterr()
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--epochs", "3"]) == 0
    said = capsys.readouterr().err
    assert "resuming at step 3 of 9 (epoch 1.00)" in said
    assert ("made longer than 3 steps: from here on the learning rate is that of a linear "
            "schedule of 9") in said  # fmt: skip
    warmup, peak = math.ceil(0.5 * 9), 3e-3
    expected = [peak * min(step / warmup, (9 - step) / (9 - warmup)) for step in range(9)]
    assert [r["lr"] for r in read_log(tmp_path / "run")][3:] == pytest.approx(expected[3:])


def test_a_warmup_that_is_a_share_of_a_longer_run_is_another(data, tmp_path, capsys):
    """With a constant learning rate, too."""
    given = train(data, tmp_path / "run", *SIZES[:-4], "--loss", "sft", "--scheduler", "constant",
                  "--warmup-ratio", "0.5", "--max-steps", "2")  # fmt: skip
    assert main(given) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--max-steps", "6"]) == 0
    said = "from here on the learning rate is that of a constant schedule of 6"
    assert said in capsys.readouterr().err
    rates = [record["lr"] for record in read_log(tmp_path / "run")]
    assert rates == pytest.approx([0, 3e-3, 2e-3, 3e-3, 3e-3, 3e-3])


def test_evaluation_draws_no_random_numbers_of_training(data, tmp_path):
    """Else a run that is made longer would be another one than the unbroken run."""
    from transformers import TrainingArguments

    from ift.cli.trainer import RunTrainer
    from ift.data import Collator
    from ift.tiny import tiny_llama, train_tokenizer

    tokenizer = train_tokenizer(["one two three"])
    row = {"input_ids": np.array([1, 2, 3]), "labels": np.array([-100, 2, 3])}
    trainer = RunTrainer(
        tiny_llama(tokenizer, max_length=8, seed=0),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True),
        data_collator=Collator(0), eval_dataset=[row] * 3,
    )  # fmt: skip
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
