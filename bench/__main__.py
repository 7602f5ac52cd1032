"""``python -m bench``: a command of its own module, else a suite of `bench.suites`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Name → its module and function. Only what is asked for is imported: the suites import every peer,
# which takes longer than most commands.
COMMANDS = {
    "report": ("page", "main"), "tour": ("tour", "main"),
    "compare": ("regress", "compare"), "run": ("regress", "run_base"),
    "static": ("static", "main"), "tune": ("tune", "main"), "backends": ("backends", "main"),
    "gpu": ("gpu", "main"), "counts": ("counts", "main"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    module, function = COMMANDS.get(name, ("suites", "main"))
    run = getattr(importlib.import_module(f"bench.{module}"), function)
    return int(run(given[1:] if name in COMMANDS else given))


if __name__ == "__main__":
    sys.exit(main())
