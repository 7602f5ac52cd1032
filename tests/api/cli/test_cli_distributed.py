"""`ift train` in several processes is `ift train` in one with the same rows per step."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from command_line import read_log, train, untimed, write_rows
from ift.cli import main
from processes import join, python, start

WORDS = ["the", "model", "learns", "to", "name", "what", "comes", "next", "and", "some", "more"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """42 rows of unequal lengths, with a rejected response each: 32 to train on, 10 to evaluate."""
    draw, rows = random.Random(0), []
    for _ in range(42):
        words = draw.sample(WORDS, 5)
        rows.append({
            "prompt": " ".join(words) + " :",
            "chosen": " " + " ".join(words[: draw.randint(1, 4)]),
            "rejected": " " + " ".join(draw.sample(WORDS, draw.randint(1, 4))),
        })  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return write_rows(path, rows)


def command(data, output, loss, batch_size, accumulate=1):
    """Arguments of `ift`; the last batch of the ten rows of evaluation is not full."""
    options = {
        "loss": loss, "batch-size": batch_size, "accumulate": accumulate, "eval-split": 10 / 42,
        "lr": 3e-3, "max-length": 48, "max-steps": 3, "eval-steps": 3, "log-steps": 1,
        "save-steps": 2,
    }  # fmt: skip
    return train(data, output, *(x for k, v in options.items() for x in (f"--{k}", v)))


def assert_same_run(output, one, tolerance=1e-5):
    """Every record, and every weight of the final model."""
    for got, wanted in zip(*(untimed(read_log(path)) for path in (output, one)), strict=True):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert got[key] == pytest.approx(wanted[key], rel=tolerance, abs=tolerance), key
    weights, own = (
        AutoModelForCausalLM.from_pretrained(Path(path) / "model").state_dict()
        for path in (output, one)
    )
    for name, weight in own.items():
        # Of a gradient that is nothing but rounding Adam makes a whole step: single weights may
        # differ, a tensor may not.
        assert (weights[name] - weight).norm() <= 1e-3 * weight.norm(), name
    assert (Path(output) / "curves.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    """The run of each loss in one process, four rows per step."""
    made = {}

    def run(loss):
        if loss not in made:
            made[loss] = tmp_path_factory.mktemp(loss)
            assert main(command(data, made[loss], loss, 4)) == 0
        return made[loss]

    return run


def worker(rank, processes, directory):
    """One run of `ift`, as torchrun would start it; the arguments lie in the directory."""
    join(rank, processes, directory)
    assert main(json.loads(Path(directory, "arguments.json").read_text())) == 0


def run_in(processes, directory, arguments):
    directory.mkdir(exist_ok=True)
    (directory / "arguments.json").write_text(json.dumps(arguments))
    start(worker, processes, directory)


@pytest.mark.parametrize(
    ("loss", "processes", "size", "accumulate"),
    [("ift", 2, 1, 2), ("dpo", 2, 1, 2), ("kto", 2, 2, 1), ("sft", 4, 1, 1)],
)
def test_processes_are_one(loss, processes, size, accumulate, data, one_process, tmp_path):
    output = tmp_path / "output"
    run_in(processes, tmp_path / "group", command(data, output, loss, size, accumulate))
    assert_same_run(output, one_process(loss))


def test_resuming_in_processes_and_in_another_number(data, one_process, tmp_path, capfd):
    output = tmp_path / "output"
    arguments = command(data, output, "ift", 2)
    run_in(2, tmp_path / "group", arguments)
    (output / "checkpoint-3").rename(tmp_path / "gone")
    run_in(2, tmp_path / "again", [*arguments, "--resume"])
    assert_same_run(output, one_process("ift"))
    assert main([*arguments, "--resume"]) == 2
    said = "--nproc-per-node: got 1; expected 2, as the run in"
    assert said in capfd.readouterr().err


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                 "--rdzv-endpoint", "localhost:0"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                   "--main_process_port", "0"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher, data, one_process, tmp_path):
    arguments = command(data, tmp_path / "output", "sft", 2)
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = python("-m", *LAUNCHERS[launcher], "-m", "ift.cli", *arguments, **alone)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "output", one_process("sft"))
    # One process speaks and writes.
    told = [line for line in done.stderr.splitlines() if line.startswith("ift train:")]
    assert len(told) == 3 and told[0].startswith("ift train: disk: ")
    assert "32 rows" in told[1] and told[2].startswith("ift train: done")
    assert sum(line.startswith("step 1/3  loss") for line in done.stderr.splitlines()) == 1
    names = {path.name for path in (tmp_path / "output").iterdir()}
    wanted = {"checkpoint-2", "checkpoint-3", "curves.png", "log.jsonl", "model", "run.json"}
    assert names == wanted | {"samples.jsonl"}
    samples = [[(line["step"], line["prompt"]) for line in read_log(path, "samples.jsonl")]
               for path in (tmp_path / "output", one_process("sft"))]  # fmt: skip
    assert samples[0] == samples[1] and len(samples[0]) == 3
