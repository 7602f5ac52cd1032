"""`ift train`: what it writes, what it refuses, and interrupted runs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time

import pytest

from command_line import read_log, refusal, train, untimed, write_rows
from ift import plotting
from ift.cli import main, options
from ift.files import JsonlLog
from processes import HANG, fork, python

WORDS = ["the", "model", "learns", "to", "name", "what", "comes", "next", "and", "some", "more"]
SMALL = ["--lr", "3e-3", "--batch-size", "4", "--max-length", "48"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty rows with a little to learn: the completion repeats words of the prompt."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for _ in range(40):
        words = draw.sample(WORDS, 5)
        rows.append({"prompt": " ".join(words) + " :", "completion": " " + " ".join(words[:3])})
    return write_rows(path, rows)


ALONE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# ---- before anything is loaded -------------------------------------------------------------------


def test_help_and_argument_errors_load_no_torch():
    code = (
        "import sys; from ift.cli import main\n"
        "assert main(['train', '--model', 'tiny', '--data', '/no', '--output', '/no']) == 2\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# Name → arguments, and what the error says.
BAD = {
    "unknown option": ("--lamb 0.2", "--lamb: unknown option; .* did you mean --lam"),
    "unknown loss": ("--loss gdpo", "--loss: got 'gdpo'; expected one of sft, asft"),
    "λ above 1": ("--lam 1.5", r"--lam: got '1.5'; expected λ in \[0, 1\]"),
    "γ below 0": ("--gamma=-0.1", r"--gamma: got '-0.1'; expected γ in \[0, 1\]"),
    "γ no number": ("--gamma x", r"--gamma: got 'x'; expected γ in \[0, 1\]"),
    "λ not finite": ("--lam nan", "--lam: got 'nan'; expected"),
    "min λ above λ": (
        "--lambda-schedule linear --min-lam 0.5",
        "--min-lam: expected at most lam = 0.2, got 0.5",
    ),
    "k": ("--rule kth --k 0", "--k: got '0'; expected a whole number of at least 1"),
    "norm of another objective": ("--objective paper --norm L2", "--norm: expected 'L1'"),
    "option of another loss": ("--loss sft --lam 0.1", "--lam: got it with --loss sft"),
    "batch size": ("--batch-size 2.5", "--batch-size: got '2.5'; expected a whole number"),
    "learning rate": ("--lr 0", "--lr: got '0'; expected a number above 0"),
    "value missing": ("--lr", "--lr: expected one argument"),
    "split of everything": ("--eval-split 1", "--eval-split: got '1'; expected a fraction"),
    "two evaluation sets": ("--eval-split 0.1 --eval-data x", "--eval-data: got it bes"),
    "two lengths": ("--epochs 1 --max-steps 3", "--max-steps: got it beside --epochs"),
    "no such data": ("--data /nowhere.jsonl", "--data: /nowhere.jsonl: No such file"),
    "no such evaluation data": ("--eval-data /nowhere.jsonl", "--eval-data: /nowhere.jsonl"),
    "no such model": ("--model ./nowhere", r"--model: no directory \./nowhere; expected"),
    "model without config": ("--model /", "--model: no config.json in /; expected"),
    "output below a file": ("--output /dev/null/out", "--output: cannot write to /dev/null/out"),
    "seed of no generator": (f"--seed {2**40}", r"--seed: got '1099511627776'; expected a"),
    "k beyond what there is": (
        "--rule kth --k 1000000 --max-steps 1",
        r"--k: expected in \[1, 64\], got 1000000",
    ),
    "nothing to learn": ("--max-length 4", "--data: no completion tokens left in any of 40"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, data, tmp_path, capsys):
    arguments, problem = BAD[name]
    assert main(train(data, tmp_path / "out", *SMALL, *arguments.split())) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("ift: ")]
    assert shown.out == "" and len(errors) == 1 and "Traceback" not in shown.err
    assert re.search(problem, errors[0])


def test_missing_arguments_and_commands(capsys):
    for arguments in ([], ["train"], ["trian"], ["train", "--model", "tiny"]):
        assert refusal(arguments, capsys).count("\n") == 1


def test_malformed_rows_are_named(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    said = f"--data: {path} line 2: got 'prompt'; expected"
    assert said in refusal(train(path, tmp_path), capsys)
    path.write_text("")
    assert "the file has no rows" in refusal(train(path, tmp_path), capsys)


def test_output_without_permission(data, tmp_path, capsys, monkeypatch):
    def refuse(**_):  # the tests may run as root, who may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    output = str(tmp_path / "out")
    problem = f"--output: cannot write to {output} (Permission denied); expected a writable"
    assert problem in refusal(train(data, output), capsys)


def test_presets_yield_to_what_is_given():
    given = ["train", "--model", "m", "--data", "d", "--output", "o", "--preset", "paper"]
    resolved = options.resolve(options.build_parser().parse([*given, "--lr", "1", "--no-bf16"]))
    assert (resolved.optimizer, resolved.scheduler, resolved.epochs) == ("rmsprop", "cosine", 3)
    assert resolved.batch_size * resolved.accumulate == 512
    assert resolved.lr == 1 and resolved.bf16 is False


# ---- whole runs ----------------------------------------------------------------------------------


SFT = [*SMALL, "--loss", "sft", "--epochs", "6", "--eval-split", "0.1", "--log-steps", "4"]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """An SFT run of the tiny model with a held-out split."""
    output = tmp_path_factory.mktemp("runs") / "sft"
    assert main(train(data, output, *SFT)) == 0
    return output


def test_a_run_leaves_model_log_and_picture(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log = read_log(trained)
    assert [r["step"] for r in log] == [4, 8, 9, 12, 16, 18, 20, 24, 27, 28, 32, 36, 40, 44, 45,
                                        48, 52, 54]  # fmt: skip
    assert [r["step"] for r in log if "eval_loss" in r] == [9, 18, 27, 36, 45, 54]  # each epoch
    for record in log:
        assert {"loss", "token_accuracy", "lr", "tokens_per_second", "epoch"} <= set(record)
        assert "lam" not in record
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert log[-1]["eval_loss"] < log[2]["eval_loss"]
    assert (trained / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(trained.glob(".*"))  # nothing unfinished is left
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert len(AutoTokenizer.from_pretrained(trained / "model")) == model.config.vocab_size


def test_evaluation_loss_is_the_mean_over_tokens(trained, data):
    """Of the whole set in plain torch, whatever the batches are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ift.data import encode, split_rows
    from ift.data_rows import read_rows

    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    _, held_out = split_rows(read_rows(data), 0.1, seed=0)
    losses = []
    for example in encode(held_out, tokenizer, 48).examples:
        ids, labels = (torch.tensor(example[k]).long() for k in ("input_ids", "labels"))
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
        losses += [-logp[t, y].item() for t, y in enumerate(labels[1:]) if y != -100]
    expected = sum(losses) / len(losses)
    assert read_log(trained)[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_from_a_directory_with_every_ift_option(trained, data, tmp_path, capsys):
    output = tmp_path / "ift"
    arguments = train(data, output, "--eval-data", data, *SMALL, model=trained / "model")
    arguments += ["--log-steps", "1"]
    arguments += ["--loss", "ift", "--lam", "0.4", "--gamma", "0.9", "--objective", "released"]
    arguments += ["--propagation", "logps", "--side", "left", "--norm", "log", "--detach-weights"]
    arguments += ["--rule", "kth", "--k", "3", "--embedding-grad"]
    arguments += ["--lambda-schedule", "linear", "--min-lam", "0.1", "--warmup-steps", "4"]
    arguments += ["--lam-noise", "0.3", "--optimizer", "rmsprop", "--scheduler", "cosine"]
    arguments += ["--bf16"]
    assert main([*arguments, "--lr-warmup-steps", "2", "--accumulate", "2", "--epochs", "1"]) == 0
    log = read_log(output)
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5]
    from ift import IFTConfig

    config = IFTConfig(lam=0.4, lambda_schedule="linear", min_lam=0.1, warmup_steps=4,
                       lam_noise=0.3)  # fmt: skip
    assert [r["lam"] for r in log] == [config.lam_at(step) for step in range(5)]
    assert log[2]["lr"] == max(r["lr"] for r in log) == 3e-3  # after two steps of warm-up
    assert "done" in capsys.readouterr().err


def test_messages_and_dropped_rows(tmp_path, capsys):
    def chat(text):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "fine"}]
        return json.dumps({"messages": turns}) + "\n"

    path = tmp_path / "chat.jsonl"
    path.write_text(chat("how?") * 6 + chat("how? " * 60))
    output = tmp_path / "out"
    assert main(train(path, output, *SMALL, "--max-steps", 1)) == 0
    assert "dropped 1 of 7 rows, which have no completion token" in capsys.readouterr().err
    assert (output / "model" / "chat_template.jinja").exists()


def test_another_run_is_not_written_over(trained, data, capsys):
    said = "holds another run; expected a new directory, or --resume"
    assert said in refusal(train(data, trained, *SMALL), capsys)
    other = train(data, trained, *SFT, "--lr", 1, "--resume")
    assert "--lr: got 1.0; expected 0.003, as the run in" in refusal(other, capsys)


def test_resuming_a_finished_run_changes_nothing(trained, data, capsys):
    before = read_log(trained)
    assert main(train(data, trained, *SFT, "--resume")) == 0
    assert read_log(trained) == before


DAMAGE = {
    "run.json": "{broken",
    "log.jsonl": "not json\n",
    "checkpoint-3/trainer_state.json": "{}",
    "checkpoint-3/log_window_0.json": '{"steps": 1, "colour": 2}',
    "checkpoint-3/config.json": "[]",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_not_continued(name, short, data, tmp_path, capsys):
    shutil.copytree(short, tmp_path / "run")
    (tmp_path / "run" / name).write_text(DAMAGE[name])
    shown = refusal(train(data, tmp_path / "run", *SHORT, "--resume"), capsys)
    errors = [line for line in shown.splitlines() if line.startswith("ift: ")]
    assert len(errors) == 1 and errors[0].startswith("ift: --resume: ")
    assert str(tmp_path / "run" / name.split("/")[0]) in errors[0]


SHORT = [*SMALL, "--max-steps", "3"]


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    """A run of three steps."""
    output = tmp_path_factory.mktemp("runs") / "short"
    assert main(train(data, output, *SHORT)) == 0
    return output


def test_what_happens_without_an_error_is_said(data, tmp_path, capsys):
    steps = ["--max-steps", 2, "--lr-warmup-steps", 2]
    assert main(train(data, tmp_path / "a", *SMALL, *steps)) == 0
    assert "the run has 2 steps, so the learning rate does not" in capsys.readouterr().err
    from ift.cli.train import summary

    assert summary([{"loss": 2.0}, {"loss": None}]) == "; loss not finite"


def test_models_that_cannot_be_loaded(data, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{broken")
    shown = refusal(train(data, tmp_path / "out", model=tmp_path), capsys)
    assert shown.count("\n") == 1 and f"--model: cannot load {tmp_path}" in shown
    # Offline from the start.
    given = train(data, tmp_path / "out", model="nobody/nothing")
    done = python("-m", "ift.cli", *given, **ALONE)
    # Not the first line: torchao says which libraries it does not load.
    assert "\nift: --model: cannot load nobody/nothing" in "\n" + done.stderr
    assert done.returncode == 2


# ---- interruptions -------------------------------------------------------------------------------

# Records, evaluations and checkpoints at different steps, randomness of both kinds, accumulation.
LONG = [*SMALL, "--max-steps", "30", "--log-steps", "7", "--save-steps", "5", "--eval-steps", "10",
        "--eval-split", "0.1", "--rule", "sample", "--lam-noise", "0.5",
        "--accumulate", "2"]  # fmt: skip


def undrawn(arguments):
    plotting.plot_run = lambda *given: None
    return main(arguments)


def completed(arguments, output):
    """Run `ift` in a process of its own."""
    process = fork(output, undrawn, arguments)
    process.join()
    assert process.exitcode == 0, output.read_text()


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    completed(train(data, folder / "unbroken", *LONG), folder / "printed")
    return folder / "unbroken"


def broken_at(arguments, checkpoint, number):
    """Send `ift` a signal as soon as a checkpoint is there; its exit code and what it printed."""
    output = checkpoint.parents[1] / "printed"
    process = fork(output, undrawn, arguments)
    deadline = time.monotonic() + HANG
    while not checkpoint.exists():
        assert process.is_alive() and time.monotonic() < deadline, output.read_text()
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join()
    return process.exitcode, output.read_text()


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_losses(data, unbroken, tmp_path):
    arguments = train(data, tmp_path / "r", *LONG)
    code, _ = broken_at(arguments, tmp_path / "r" / "checkpoint-10", signal.SIGKILL)
    assert code == -signal.SIGKILL
    # What a kill may leave behind: half a checkpoint, half a line.
    (tmp_path / "r" / ".unfinished" / "checkpoint-25").mkdir(parents=True, exist_ok=True)
    with (tmp_path / "r" / "log.jsonl").open("a") as file:
        file.write('{"step": 2')
    completed([*arguments, "--resume"], tmp_path / "printed")
    assert untimed(read_log(tmp_path / "r")) == untimed(read_log(unbroken))
    assert not list((tmp_path / "r").glob(".*"))
    assert [r["step"] for r in read_log(unbroken)] == [7, 10, 14, 20, 21, 28, 30]


@pytest.mark.slow
def test_interrupted_run_ends_in_one_line_and_resumes(data, unbroken, tmp_path):
    arguments = train(data, tmp_path / "r", *LONG)
    code, shown = broken_at(arguments, tmp_path / "r" / "checkpoint-10", signal.SIGINT)
    assert code == 130
    assert "Traceback" not in shown
    assert shown.splitlines()[-1].startswith("ift train: interrupted at step ")
    saved = max(int(path.name[11:]) for path in (tmp_path / "r").glob("checkpoint-*"))
    assert f"interrupted at step {saved} of 30" in shown  # nothing of the work is lost
    completed([*arguments, "--resume"], tmp_path / "printed")
    assert untimed(read_log(tmp_path / "r")) == untimed(read_log(unbroken))


def test_failed_checkpoint_leaves_none(data, tmp_path, monkeypatch):
    from ift.cli import trainer

    def fail(self, checkpoint):
        raise OSError("disk full")

    monkeypatch.setattr(trainer.ResumableRun, "_window_in", fail)
    output = tmp_path / "out"
    with pytest.raises(OSError, match="disk full"):
        main(train(data, output, *SMALL, "--max-steps", 1))
    assert not list(output.glob("checkpoint-*"))


def test_log_survives_torn_lines_and_rewinds(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl")
    assert log.read() == []
    for step in range(1, 5):
        log.append({"step": step, "loss": 1.0 / step if step < 4 else float("nan")})
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in log.read()] == [1, 2, 3, 4] and log.read()[-1]["loss"] is None
    log.rewind(2)
    log.append({"step": 3, "loss": 0.0})
    assert [r["step"] for r in log.read()] == [1, 2, 3]


# ---- the output head -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sft", "ift"])
def test_active_gradient_and_frozen_head(loss, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ift import tiny

    losses = {}
    for gradient in ("exact", "active"):
        out = tmp_path / gradient
        head = ["--loss", loss, "--gradient", gradient, "--freeze-head", "--log-steps", 1]
        assert main(train(data, out, *SHORT, *head)) == 0
        losses[gradient] = [r["loss"] for r in read_log(out) if "loss" in r]
        trained = AutoModelForCausalLM.from_pretrained(out / "model")
        tokenizer = AutoTokenizer.from_pretrained(out / "model")
        fresh = tiny.tiny_llama(tokenizer, max_length=48, seed=0)
        assert trained.lm_head.weight.equal(fresh.lm_head.weight)
        first = "model.layers.0.mlp.up_proj.weight"
        assert not trained.state_dict()[first].equal(fresh.state_dict()[first])
    assert len(losses["exact"]) == 3
    assert losses["active"] == pytest.approx(losses["exact"], rel=1e-3)


def test_float32_logits_and_determinism(data, tmp_path, capsys):
    """A run with both, from a file; its `run.json` holds them, and another run is refused."""
    file = tmp_path / "run.yaml"
    file.write_text("bf16: true\nlogits-dtype: float32\ndeterministic: true\n")
    losses = {}
    for name, given in {"rounded": ["--bf16"], "float32": ["--config", file]}.items():
        command = train(data, tmp_path / name, *SHORT, "--log-steps", 1, *given)
        assert main(command) == 0
        losses[name] = [r["loss"] for r in read_log(tmp_path / name) if "loss" in r]
    run = json.loads((tmp_path / "float32" / "run.json").read_text())
    assert run["logits_dtype"] == "float32" and run["deterministic"] is True
    assert losses["float32"] == pytest.approx(losses["rounded"], rel=1e-2)
    assert losses["float32"][0] != losses["rounded"][0]
    said = refusal([*command, "--resume", "--no-deterministic"], capsys)
    assert "--deterministic: got False; expected True, as the run in" in said
    said = refusal([*train(data, tmp_path / "rounded", *SHORT, "--log-steps", 1, "--bf16"),
                    "--resume", "--logits-dtype", "float32"], capsys)  # fmt: skip
    assert "--logits-dtype: got float32; expected the default, as the run in" in said
