"""The command line, ``ift``: train, check, score, report, dynamics, doctor and numerics.

A mistake of the user ends in one line on stderr and exit code 2.  torch and transformers are
imported only once a command needs them, so ``ift --help`` and argument errors are immediate.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

from ift.cli import processes
from ift.cli.errors import CliError
from ift.cli.options import build_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit code: 0 done, 1 wrong (`check`, `doctor`), 2 bad input, 130 interrupted, 141 if
        what it prints has no reader.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _close_broken_streams():
            raise  # another pipe than ours
        return 141


def _close_broken_streams() -> bool:
    """Let Python's last flush at exit write nowhere; whether any reader had left."""
    broken = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
    for stream in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(broken)


def _has_no_reader(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
    except (AttributeError, OSError, ValueError):  # no such call, or no file behind the stream
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        arguments = parser.parse(argv)
        processes.command = arguments.command
        command = importlib.import_module(f"ift.cli.{arguments.command}")
        return int(command.run(arguments))
    except CliError as error:
        print(f"ift: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "ift").split(".")[0] in ("ift", "ift_kernels"):
            raise  # a fault of ours, which no extra would mend
        needs = f"needs {error.name!r}, which is not installed"
        hint = 'pip install "ift-kernels[train]"'
        print(f"ift: {arguments.command}: {needs}: {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ift: interrupted", file=sys.stderr)
        return 130
