"""What a resumed run of `ift train` keeps, may change, and refuses."""

import shutil

import pytest
from transformers import AutoTokenizer, TrainerCallback

from command_line import read_log, refusal, train, untimed, write_rows
from ift.cli import main, options
from ift.cli import train as command
from ift.tiny import tiny_llama, train_tokenizer

ROWS = [
    {"prompt": f"count {i}:", "chosen": f" {i} {i + 1}", "rejected": f" {9 - i}"} for i in range(8)
]
FEW = ["--lr", "1e-2", "--batch-size", "2", "--max-length", "32", "--max-steps", "4"]
STEPS = ["--log-steps", "1", "--save-steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)


@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    """Four steps of SFT in bfloat16, with the checkpoint of step 2 alone; and their log."""
    output = tmp_path_factory.mktemp("runs") / "sft"
    assert main(train(data, output, "--loss", "sft", "--dtype", "bfloat16", *FEW, *STEPS)) == 0
    shutil.rmtree(output / "checkpoint-4")
    return output, untimed(read_log(output))


def test_tiny_in_bfloat16_resumes_exactly(half, tmp_path):
    output, whole = half
    shutil.copytree(output, tmp_path / "run")
    assert main(["train", "--resume", "--output", str(tmp_path / "run")]) == 0
    assert untimed(read_log(tmp_path / "run")) == whole


def test_the_steps_of_the_log_and_of_checkpoints_may_change(half, tmp_path):
    output, _ = half
    shutil.copytree(output, tmp_path / "run")
    again = ["train", "--resume", "--output", str(tmp_path / "run")]
    assert main([*again, "--log-steps", "2", "--save-steps", "1", "--save-total-limit", "0"]) == 0
    assert [record["step"] for record in read_log(tmp_path / "run")] == [1, 2, 4]
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (2, 3, 4)
    }


class Counted(TrainerCallback):
    """Steps that the clock of the run has counted when another callback sees their ends."""

    found = ()

    def on_step_end(self, args, state, control, **_):
        self.found += ((state.global_step, self.clock.steps),)


def test_other_callbacks_are_not_timed(data, tmp_path, monkeypatch):
    """tokens_per_second is that of training, whatever a callback does at the end of a step."""
    from ift.cli import trainer

    counted, restored = Counted(), trainer.ResumableRun.training_step

    def watched(self, *args):
        counted.clock = self.window
        return restored(self, *args)

    monkeypatch.setattr(trainer.ResumableRun, "training_step", watched)
    given = train(data, tmp_path / "run", "--loss", "sft", *FEW, "--log-steps", "4")
    arguments = options.resolve(options.build_parser().parse(given))
    assert command.run_resolved(arguments, lambda *_: counted) == 0
    assert counted.found == tuple((step, step) for step in (1, 2, 3, 4))


# ---- the reference -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    """DPO from a model on disk, and with another one as its reference; each can be continued."""
    place = tmp_path_factory.mktemp("dpo")
    tokenizer = train_tokenizer([text for row in ROWS for text in row.values()], 300)
    for seed, name in enumerate(("model", "other")):
        model = tiny_llama(tokenizer, hidden=32, layers=1, seed=seed)
        model.config.attention_dropout = 0.1
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name, more in (("plain", ()), ("named", ("--reference", place / "other"))):
        given = ["--loss", "dpo", "--max-steps", "1", "--batch-size", "4", "--max-length", "32"]
        given += ["--eval-split", "0.25", "--samples", "0", "--no-dropout", *more]
        assert main(train(data, place / name, *given, model=place / "model")) == 0
    return place


@pytest.mark.parametrize(("run", "changed"), [("plain", "model"), ("named", "other")])
def test_a_resumed_run_has_the_reference_of_its_start(compared, run, changed, tmp_path, capsys):
    """Of that path or hub name; an unchanged one passes, whether its cache is whole or damaged."""
    shutil.copytree(compared / run, tmp_path / "run")
    again = ["train", "--resume", "--output", str(tmp_path / "run"), "--max-steps"]
    next((tmp_path / "run" / "reference").iterdir()).write_bytes(b"damaged")
    assert main([*again, "2"]) == 0
    shutil.copytree(compared / changed, tmp_path / "kept")
    flag = "--model" if run == "plain" else "--reference"
    tokenizer = AutoTokenizer.from_pretrained(compared / changed)
    tiny_llama(tokenizer, hidden=32, layers=1, seed=7).save_pretrained(compared / changed)
    try:
        before = sorted((tmp_path / "run" / "reference").iterdir())
        said = refusal([*again, "3"], capsys).splitlines()[-1]
        assert said.startswith(f"ift: {flag}: got a reference of other weights or config")
        assert sorted((tmp_path / "run" / "reference").iterdir()) == before and len(before) == 2
        other = train_tokenizer(["quite other text, of which other pairs are frequent"] * 9)
        tiny_llama(other, hidden=32, layers=1).save_pretrained(compared / changed)
        other.save_pretrained(compared / changed)
        said = refusal([*again, "3"], capsys).splitlines()[-1]
        assert said.startswith(f"ift: {flag}: {compared / changed}: the token ")
        assert said.endswith("as in that of the checkpoint")
    finally:
        shutil.rmtree(compared / changed)
        shutil.copytree(tmp_path / "kept", compared / changed)
