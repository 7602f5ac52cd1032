"""Commands as they are typed: exit code and last line of each; help of all options; pipes."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from command_line import train, write_rows
from ift.cli import main, options
from processes import run


def test_every_option_has_help():
    def parsers(parser):
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from parsers(inner)

    found = {
        (parser.prog, option): action.help
        for parser in parsers(options.build_parser())
        for action in parser._actions
        for option in action.option_strings or [action.dest]
    }
    # A sentence without a subject; that of a subcommand is at its group's.
    bare = {key for key, text in found.items() if not (text and text.strip(" ()"))}
    assert {name for _, name in bare} <= {"command", "action"} and len(found) > 140


# Stream → command, and how it ends: one that prints nothing there ends as ever.
LEAVING = {
    "stdout": {
        "--help": 141,
        "train --help": 141,
        "doctor": 141,
        "dynamics plot no": 2,
        "train": 0,
    },
    "stderr": {"--help": 0, "doctor": 0, "dynamics plot no": 141, "train": 141},
}  # fmt: skip


@pytest.mark.parametrize("stream", LEAVING)
def test_a_reader_that_leaves_ends_it_without_a_word(stream, tmp_path, monkeypatch):
    """As ``| head`` does."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    for command, code in LEAVING[stream].items():
        given = train(data, tmp_path / "out", "--max-length", 48, "--max-steps", 1)
        reading, writing = os.pipe()
        os.close(reading)
        left = os.fdopen(writing, "w", buffering=1 if stream == "stderr" else -1)
        with monkeypatch.context() as patched:
            patched.setattr(sys, stream, left)
            try:
                found = main(given if command == "train" else command.split())
            except SystemExit as stop:
                found = stop.code
        left.close()  # writes what is left, as the end of a process does
        assert found == code, command


def test_a_shell_sees_no_traceback_of_a_reader_that_leaves(tmp_path):
    script = "set -o pipefail; $0 -m ift.cli train --help 2>said | true"
    done = run("bash", "-c", script, sys.executable, cwd=tmp_path)
    assert done.returncode in (0, 141) and (tmp_path / "said").read_text() == ""


def test_another_broken_pipe_is_a_fault(monkeypatch):
    def fail(_):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("ift.cli.doctor.run", fail)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["doctor"])


def invocations():
    """Of the list: command, exit code, and its last line, with ``*`` for anything."""
    text = Path(__file__).with_name("invocations.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for command, result in zip(lines[::2], lines[1::2], strict=True):
        code, _, last = result.partition(" ")
        yield command.removeprefix("$ ift").strip(), int(code), last


def test_the_list_of_invocations(tmp_path, monkeypatch, capsys):
    """One after another in one directory: later ones use what earlier ones leave."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), ROWS)
    write_rows(Path("pairs.jsonl"), PAIRS)
    Path("bad.jsonl").write_text('{"prompt": "a"}\n')
    Path("tiny.yaml").write_text(TINY)
    Path("typo.yaml").write_text("lerning_rate: 1e-3\n")
    wrong = []
    for command, code, last in invocations():
        try:
            found = main(shlex.split(command))
        except SystemExit as stop:
            found = stop.code
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        line = (shown.out + shown.err).rstrip().rpartition("\n")[2]
        pattern = re.escape(last).replace(r"\*", ".*")
        if found != code or not re.fullmatch(pattern, line):
            wrong.append(f"$ ift {command}\n{found} {line}")
    assert not wrong, "\n" + "\n".join(wrong)


ROWS = [{"prompt": f"count {i}:", "completion": f" {i} {i + 1}"} for i in range(12)]
PAIRS = [{"prompt": "say red:", "chosen": " red", "rejected": " blue round"}] * 6
TINY = """\
# settings that the runs of the list share
model: tiny
data: rows.jsonl
cpu: true
max-steps: 2
batch-size: 4
max-length: 32
"""
