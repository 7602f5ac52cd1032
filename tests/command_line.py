"""`ift train` in tests: its arguments, the rows that it reads, the log that it leaves."""

import json
from pathlib import Path

from ift.cli import main


def train(data, output, *more, model="tiny"):
    """Arguments of `ift` for a training run on the CPU."""
    given = ["--model", model, "--data", data, "--output", output, *more]
    return ["train", "--cpu", *map(str, given)]


def refusal(arguments, capsys):
    """What `ift` says as it ends with exit code 2."""
    assert main(arguments) == 2
    return capsys.readouterr().err


def write_rows(path, rows):
    """One JSON object a line; returns the path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_log(output, name="log.jsonl"):
    """The records of a run, or those of another of its files."""
    lines = Path(output, name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def untimed(records):
    """Records without what two equal runs do not share."""
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in timed} for record in records]
