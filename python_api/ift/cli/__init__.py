"""The command line: ``ift train``, ``ift report``, ``ift dynamics`` and ``ift doctor``.

A mistake of the user ends in one line on stderr and exit code 2.  torch and transformers are
imported only once a command needs them, so ``ift --help`` and argument errors are immediate.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ift.cli.errors import CliError
from ift.cli.options import build_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit code: 0 done, 2 bad input, 130 interrupted.
    """
    parser = build_parser()
    try:
        arguments = parser.parse(argv)
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
