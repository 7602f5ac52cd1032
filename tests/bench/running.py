"""The command `bench` in tests."""

import json

import pytest

from bench.__main__ import main
from processes import NEVER_ENDS


def run(folder, *arguments, rounds=1):
    """The report of a suite that is measured in full."""
    file = folder / "found.json"
    options = ["--threads", "1", "--rounds", str(rounds), *NEVER_ENDS, "--json", str(file)]
    assert main([*arguments, *options]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def assert_exits(arguments, message, capsys):
    """The command ends with an error that says `message`."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
